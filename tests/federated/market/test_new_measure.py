"""A measure in the table is everywhere: the one that docs/market.md adds, run as it is written there."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.market import Scored
from federated.market import cli
from federated.market.fingerprint import Encoder
from federated.market.measures import MEASURES
from federated.market.messages import BuyerKey, SellerResponse
from federated.market.query import answer, make_query
from federated.market.rank import rank
from federated.market.score import score

PAGE = Path(__file__).resolve().parents[3] / "docs" / "market.md"
ENCODER = Encoder("vectors", "0" * 64, "none", False, 24)


def rows(n: int, seed: int, decay: float = 3.0) -> torch.Tensor:
    spread = torch.linspace(0, decay, 24).neg().exp()
    return torch.randn(n, 24, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.fixture
def alignment() -> Iterator[None]:
    """The page's measure, entered as the page says, and taken out after the test."""
    section = PAGE.read_text().split("\n## Add a measure\n")[1].split("\n## ", 1)[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(compile(block, str(PAGE), "exec"), {})
    yield
    del MEASURES["alignment"]


@pytest.fixture(scope="module")
def market() -> tuple[BuyerKey, dict[str, SellerResponse]]:
    query, key = make_query(rows(200, 0), ENCODER, directions=5, decoys=0, seed=1)
    data = {"steep": rows(300, 1, 6.0), "same": rows(300, 2), "flat": rows(300, 3, 0.0)}
    return key, {name: answer(query, [x], ENCODER, name) for name, x in data.items()}


@pytest.mark.usefixtures("alignment")
def test_sellers_are_scored_and_ranked_by_a_measure_from_outside(market) -> None:
    key, responses = market
    sellers = {name: key.seller(response) for name, response in responses.items()}
    ranked = rank(key.buyer(), sellers, by="alignment", draws=100)
    assert [r.seller for r in ranked] == ["same", "steep", "flat"]
    for r in ranked:
        value, error = score(key.buyer(), sellers[r.seller], "alignment")
        assert r.scores["alignment"].value == value
        assert 0 < error < 0.2


@pytest.mark.usefixtures("alignment")
def test_the_command_ranks_by_it_and_writes_it(market, tmp_path, capsys) -> None:
    key, responses = market
    key.save(tmp_path / "key")
    for name, response in responses.items():
        response.save(tmp_path / name)
    files = [str(tmp_path / name) for name in responses]
    written = tmp_path / "ranking.json"
    assert cli.main(["rank", "--key", str(tmp_path / "key"), "--by", "alignment", "--json", str(written), *files]) == 0
    header, best, *_ = capsys.readouterr().out.splitlines()
    assert "alignment" in header
    assert "same" in best
    assert all("alignment" in row for row in json.loads(written.read_text())["ranking"])


@pytest.mark.usefixtures("alignment")
def test_the_benchmark_measures_it() -> None:
    assert 0 < Scored(rows(100, 0), ENCODER, 0).measures(rows(200, 1))["alignment"] <= 1


def test_once_taken_out_it_is_nowhere(market, tmp_path, capsys) -> None:
    key, responses = market
    with pytest.raises(ValueError, match="a measure must be one of relevance, .*vendi, got 'alignment'"):
        score(key.buyer(), key.seller(responses["same"]), "alignment")
    with pytest.raises(SystemExit):
        cli.main(["rank", "--key", "key", "--by", "alignment", "a.json"])
    assert "invalid choice: 'alignment'" in capsys.readouterr().err

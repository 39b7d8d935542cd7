"""Every argument that may name a file: whatever it names, it is taken or refused in one sentence, before training."""

import dataclasses
import importlib
import sys
from typing import get_args, get_type_hints

import pytest
from transformers import HfArgumentParser

import arguments
import finetune
from arguments import DataArguments, FinetuneArguments, ModelArguments, SGCArguments

CLASSES = (ModelArguments, DataArguments, FinetuneArguments, SGCArguments)
TEXTS = [
    field.name
    for kind in CLASSES
    for field in dataclasses.fields(kind)
    if {str, list[str]} & {hint := get_type_hints(kind)[field.name], *get_args(hint)}
]
READ = ("model_name_or_path", "dataset", "eval_dataset", "metric", "resume_from_checkpoint")  # no run without them
READ += ("deepspeed", "fsdp_config", "accelerator_config")
QUICK = ["--max_train_samples", "16", "--max_eval_samples", "4", "--generate_samples", "1", "--disable_tqdm", "true"]

pytestmark = pytest.mark.usefixtures("offline")


class Reached(BaseException):
    """Everything was accepted: training would begin."""


def hostile(folder, suffix=""):
    """Make what a path can wrongly be; return it by what it is."""
    (folder / "a-folder").mkdir()
    (folder / f"a-file{suffix}").write_bytes(bytes(range(128, 256)))
    (folder / f"json{suffix}").write_text("[" * 5000)
    (folder / "a-folder" / "config.json").write_bytes(b"\xff{")
    return {
        "missing": f"{folder}/no/such{suffix}",
        "missing, and relative": f"./no-such{suffix}",
        "a folder": f"{folder}/a-folder",
        "no text": f"{folder}/a-file{suffix}",
        "nested": f"{folder}/json{suffix}",
        "below a file": f"{folder}/a-file{suffix}/below{suffix}",
        "too long": f"{folder}/{'x' * 300}{suffix}",
        "much too long": f"{'x' * 5000}{suffix}",
        "of nobody": f"~nobody-is-called-so/x{suffix}",
        "two lines": f"{folder}/two\nlines{suffix}",
        "empty": "",
    }


def rows_file(folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(f'{{"text": "row {i} of words"}}\n' for i in range(20)))
    return path


NAMES = ["missing", "missing, and relative", "a folder", "no text", "nested", "below a file", "too long"]
NAMES += ["much too long", "of nobody", "two lines", "empty"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the command up to its training; return its exit code, None where it got there, and its last line."""

    def reached(*_, **__):
        raise Reached

    def run(*argv):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(finetune, "train", reached)
        monkeypatch.setattr(finetune, "EMBEDDED_ROWS", {"train": 16, "test": 4})
        monkeypatch.setattr(sys, "argv", ["finetune.py", *argv])
        try:
            finetune.main()
        except Reached:
            return None, ""
        except SystemExit as stop:
            said = capsys.readouterr().err.strip()
            return stop.code, said.splitlines()[-1] if said else ""
        raise AssertionError("the command neither trained nor ended")

    return run


@pytest.mark.parametrize("kind", NAMES)
def test_any_text_argument_is_taken_or_refused_in_a_sentence(run, tmp_path, kind):
    value = hostile(tmp_path)[kind]
    rows = rows_file(tmp_path)
    for name in TEXTS:
        dataset = ["--dataset", str(rows)] if name in ("eval_dataset", "dataset_config") else []
        code, said = run(*QUICK, *dataset, "--output_dir", str(tmp_path / "out"), f"--{name}={value}")
        assert code in (None, 2), name
        assert code is None or said.startswith("finetune.py: error: "), name
        assert name not in READ or code == 2 or value == "", f"--{name} {value} is taken"
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", NAMES)
def test_a_file_of_arguments_is_read_or_refused_in_a_sentence(run, tmp_path, kind):
    value = hostile(tmp_path, ".yaml")[kind]
    code, said = run(value if value.endswith(".yaml") else value + ".yaml")
    assert code == 2
    assert said.startswith("finetune.py: error: ")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ""])
def test_data_that_are_none_are_refused_in_a_sentence(run, tmp_path, suffix):
    rows = rows_file(tmp_path)
    for kind, value in hostile(tmp_path, suffix).items():
        for name in ("dataset", "eval_dataset"):
            given = [f"--{name}={value}", *(["--dataset", str(rows)] if name == "eval_dataset" else [])]
            code, said = run(*QUICK, *given, "--output_dir", str(tmp_path / "out"))
            assert code in (2, None if suffix == ".txt" else 2), (kind, name)
            assert code is None or said.startswith("finetune.py: error: "), (kind, name)


def test_the_list_of_text_arguments_is_the_parsers():
    parser = HfArgumentParser(CLASSES)
    texts = {action.dest for action in parser._actions if action.type is str and not action.choices}
    assert texts <= set(TEXTS)
    assert {name for name in READ if not hasattr(arguments, name)} <= set(TEXTS)


@pytest.mark.parametrize("module", ["pretrain_tiny", "train_digit_encoder"])
@pytest.mark.parametrize("kind", ["no text", "below a file", "too long"])
def test_where_a_command_can_not_write_it_says_so_before_any_work(tmp_path, monkeypatch, capsys, module, kind):
    command = importlib.import_module(module)
    for name in ("make_model", "train"):
        monkeypatch.setattr(command, name, None, raising=False)  # whoever works, fails
    value = hostile(tmp_path)[kind]
    monkeypatch.setattr(sys, "argv", [f"{module}.py", "--output_dir", value])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"{module}.py: error: --output_dir must be a ")

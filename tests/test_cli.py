"""The command `sgc`: what it prints, what it refuses, and that it comes with the package."""

import importlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from sgc import cli
from tests.test_planner import tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture
def model(tmp_path):
    tiny().save_pretrained(tmp_path)
    return str(tmp_path)


ARGUMENTS = ["--sequence-length", "8", "--gpu-memory", "2GB"]


def test_a_plan_is_printed_with_a_row_for_every_optimizer(model, capsys):
    assert cli.main(["plan", model, *ARGUMENTS]) == 0
    out = capsys.readouterr().out
    for name in ("SGC()", "compressed gradients", "AdamW, fp32 state", "8-bit AdamW", "Adafactor", "GaLore", "APOLLO"):
        assert name in out
    for name in ("LoRA", "QLoRA", "SGD", "largest sketch that fits", "2.0 GB of memory, of which 1.0 are kept free"):
        assert name in out
    assert "\033" not in out  # no terminal


def test_a_plan_as_json_is_json_and_a_plot_is_drawn(model, capsys, tmp_path):
    assert cli.main(["plan", model, "--sequence-length", "8", "--json", "--plot", str(tmp_path / "plan.png")]) == 0
    held = json.loads(capsys.readouterr().out)
    assert held["parameters"] > 0
    assert held["budget"] is None
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-model"], "no model 'no-such-model' here"),
        (["llama-3-8b", "--gpu-memory", "lots"], "memory must be a positive amount"),
        (["llama-3-8b", "--batch-size", "0"], "batch size must be a whole number of at least 1, got 0"),
        (["llama-3-8b", "--sequence-length", "9000"], "at most the model's 8192 positions, got 9000"),
        (
            ["llama-3-8b", "--world-size", "0"],
            "world size must be a whole number of at least 1 and at most 65536, got 0",
        ),
        (
            ["gpt2", "--gpu-memory", "24"],
            """memory must be a positive amount with its unit, such as "24GB" or "24GiB", got '24'""",
        ),
        (["gpt2", "--gpu-memory", "24MB"], "memory must be at least the 1,000,000,000 bytes kept free, got '24MB'"),
        (["gpt2", "--strategy", "zero2"], "--strategy zero2 needs --world-size"),
        (["gpt2", "--plot", "no/such/plan.png"], "the plot 'no/such/plan.png' can't be written: No such file"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_code_2(arguments, words, capsys):
    assert cli.main(["plan", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.count("\n") == 1


def options():
    """Every argument of `sgc plan`, as the parser knows it."""
    commands = next(action for action in cli._parser()._actions if action.dest == "command")
    return [action for action in commands.choices["plan"]._actions if action.dest != "help"]


ODD = ["", " ", "x", "two words", "line\nbreak", "nan", "inf", "-inf", "-1", "0", "1.5", "1e30", "9" * 30, "9" * 5000]
ODD += [
    "24",
    "-1GB",
    "0GB",
    "9e99GB",
    "24GB",
    "{folder}",
    "{folder}/no/such",
    "{folder}/a.png",
    "x" * 300,
    "a\0b",
    "\udcff",
]
FOLDER = "{folder}"


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    """A folder with a model so small that a plan takes no time; a folder with a plot's name lies in it."""
    folder = tmp_path_factory.mktemp("smallest")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "head_dim": 4, "num_attention_heads": 2, "num_hidden_layers": 1}
    tiny(vocab_size=16, **sizes).save_pretrained(folder)
    (folder / "a.png").mkdir()
    return folder


@pytest.mark.parametrize("action", options(), ids=lambda action: action.dest)
def test_every_argument_with_any_value_ends_in_a_plan_or_in_one_sentence(action, smallest, capsys, monkeypatch):
    monkeypatch.chdir(smallest)
    names = action.option_strings or [""]
    values = [None] if action.nargs == 0 else []
    for name in names:
        for value in [*values, *ODD]:
            given = [name] if value is None else [f"{name}={value}" if name else value]
            given = [words.replace(FOLDER, str(smallest)) for words in given]
            model = [] if not name else [str(smallest)]
            try:
                code = cli.main(["plan", *model, *given, *(["--sequence-length=8"] if "--seq" not in name else [])])
            except SystemExit as ended:  # argparse's own way
                code = ended.code
            out, err = capsys.readouterr()
            if code == 0:
                assert out.count("\n") > 5, given
                assert err == "", given
            else:
                assert (code, out) == (2, ""), given
                assert err.strip(), given
                assert err.count("\n") == 1, given
    assert sorted(path.name for path in smallest.iterdir()) == ["a.png", "config.json"]


def test_a_plan_is_printed_though_its_plot_fails(model, capsys, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert cli.main(["plan", model, "--sequence-length", "8", "--plot", str(tmp_path / "plan.png")]) == 2
    out, err = capsys.readouterr()
    assert "SGD, no momentum" in out
    assert err.endswith("can't be written: No space left on device\n")
    assert err.count("\n") == 1


def test_a_bad_plot_and_a_bad_spec_of_devices_are_refused_before_the_work(model, capsys, monkeypatch):
    begun = importlib.import_module("sgc.planner.plan")
    monkeypatch.setattr(begun, "make_model", lambda *_, **__: pytest.fail("the work has begun"))
    for bad in (
        ["--plot", "plan.xyz"],
        ["--plot", model],
        ["--world-size", "0"],
        ["--lora-rank", "0"],
        ["--reserve", "1"],
    ):
        assert cli.main(["plan", model, *bad]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_an_option_that_is_none_ends_in_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "gpt2", "--strategy", "magic"])
    assert ended.value.code == 2


@pytest.mark.parametrize(("environment", "colored"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_a_terminal_sees_what_fits_in_green_unless_it_wants_no_color(model, environment, colored):
    reader, writer = pty.openpty()
    command = [sys.executable, "-W", "ignore", "-m", "sgc.cli", "plan", model, *ARGUMENTS]
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    try:
        subprocess.run(
            command, stdout=writer, stderr=subprocess.DEVNULL, cwd=ROOT, env={**inherited, **environment}, check=True
        )
        os.set_blocking(reader, False)
        shown = os.read(reader, 1 << 20).decode()
    finally:
        os.close(reader)
        os.close(writer)
    assert "fits" in shown
    assert ("\033[32m" in shown) is colored


def test_the_command_comes_with_the_package():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["sgc"] == "sgc.cli:main"


def test_the_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    options = ("--gpu-memory", "--gradient-checkpointing", "--world-size", "--strategy", "--json", "--plot", "--dtype")
    assert [option for option in options if option not in out] == []

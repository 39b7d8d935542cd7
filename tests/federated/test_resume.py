"""A run that is over stays over, one that is stopped loses nothing, and a damaged file is named."""

import ast
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import federated.round
from federated import simulate
from federated.channel import Channel, MultipleAccess
from federated.downlink import SelectionDownlink
from federated.simulate import Simulation
from federated.uplink import AnalogUplink, IdealUplink, SketchedUplink
from tests.federated.small import small_data, small_parts, training

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "recipes"))
mnist = __import__("federated_mnist")
sys.path.remove(str(REPOSITORY / "recipes"))
DATA, PARTS, TEST = small_data(), small_parts(), small_data(40, seed=1)
FEW = ["--devices", "4", "--batch_size", "8", "--steps", "1", "--scheme", "downlink-selection"]


def simulation(folder, **arguments):
    """Links that remember all there is."""
    links = {
        "downlink": SelectionDownlink(Channel.from_snr(15.0, ofdm_symbols=60), 3),
        "uplink": SketchedUplink(IdealUplink(), chunk_size=65, sketch_size=40, sparsity=8, residual=0.9),
        "server_momentum": 0.5,
    }
    return Simulation(training(), DATA, PARTS, test=TEST, output_dir=folder, **(links | arguments))


# ------------------------------------------------------------------------------------------ damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run with a checkpoint after its second round."""
    folder = tmp_path_factory.mktemp("whole")
    list(simulation(folder, checkpoint_every=2).run(2, progress=False))
    return folder


def parts_of(value, path=()):
    """Yield where every part of a state lies."""
    if isinstance(value, dict) and path != ("describes",):
        for name in value:
            yield (*path, name)
            yield from parts_of(value[name], (*path, name))


def changed(state, path, change):
    """Return a state with one part changed, or taken out."""
    fresh = dict(state)
    if len(path) > 1:
        fresh[path[0]] = changed(state[path[0]], path[1:], change)
    elif change is None:
        del fresh[path[0]]
    else:
        fresh[path[0]] = change(state[path[0]])
    return fresh


def worse(value):
    """Yield what a part can't be."""
    yield None  # it is missing
    yield from (lambda _: None, lambda _: "text", lambda _: [1], lambda _: -1, lambda _: torch.ones(3, 2))
    if isinstance(value, torch.Tensor):
        yield from (torch.Tensor.double, torch.Tensor.half, torch.Tensor.long)
        yield from (lambda x: x[..., :-1], lambda x: x[None], lambda x: x * torch.nan)


def test_a_state_with_any_part_missing_or_wrong_is_named_and_leaves_no_trace_behind(whole, tmp_path):
    """Every part that a state has, whatever it may hold some day."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    file = folder / "checkpoint-00000002" / "state.pt"
    state = torch.load(file, weights_only=True)
    assert len(list(parts_of(state))) > 8
    refused = 0
    for path in parts_of(state):
        value = state
        for name in path:
            value = value[name]
        for change in worse(value):
            if (path, change) == (("uplink", "residual"), None):
                continue  # there is none before an update was heard
            torch.save(changed(state, path, change), file)
            if isinstance(value, str) and change is not None and change(value) == "text":
                continue  # why a run ended is any text
            with pytest.raises(ValueError, match="checkpoint-00000002' (is damaged|is of another run)"):
                simulation(folder).resume()
            refused += 1
    assert refused > 60
    torch.save(state, file)
    assert simulation(folder).resume() == 2


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04N.", None, "list", "number", "pickle"])
def test_a_file_that_is_no_state_is_named(content, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    file = folder / "checkpoint-00000002" / "state.pt"
    made = io.BytesIO()
    if content in ("list", "number"):
        torch.save([1] if content == "list" else 5, made)
        content = made.getvalue()
    elif content == "pickle":
        torch.save({"round": Path("code that would run")}, made)
        content = made.getvalue()
    file.write_bytes(file.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ValueError, match=r"checkpoint-00000002' (can't be read: state.pt|is damaged)"):
        simulation(folder).resume()


def test_a_memory_of_another_size_is_named(tmp_path):
    list(simulation(tmp_path, checkpoint_every=2, memory_limit=1, devices_at_once=2).run(2, progress=False))
    for path in (tmp_path / "checkpoint-00000002").glob("*.bin"):
        content = path.read_bytes()
        path.write_bytes(content[:-4])
        with pytest.raises(
            ValueError, match=f"checkpoint-00000002' is damaged: {path.name} must have {len(content)} bytes"
        ):
            simulation(tmp_path, memory_limit=1, devices_at_once=2).resume()
        path.write_bytes(content)
    assert simulation(tmp_path, memory_limit=1, devices_at_once=2).resume() == 2


@pytest.mark.parametrize(
    "line", ["{nonsense}", "[1]", '{"a": 1}', "", '{"round": "1"}', "[" * 100_000, '{"round": true}']
)
def test_a_line_that_is_no_row_is_named(line, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    rows = folder / "rows.jsonl"
    rows.write_text(rows.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"every line of '.*rows.jsonl' must be a row with round, line 3 is none"):
        simulation(folder).resume()


def test_the_newest_checkpoint_is_the_one_of_the_last_round_whatever_the_clock_says(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    old = tmp_path / "run" / "checkpoint-00000002"
    shutil.copytree(old, tmp_path / "run" / "checkpoint-abcdefgh")  # another program's
    list(simulation(tmp_path / "other", checkpoint_every=1).run(3, progress=False))
    shutil.copytree(tmp_path / "other" / "checkpoint-00000003", tmp_path / "run" / "checkpoint-00000003")
    for path in (*old.iterdir(), old):
        os.utime(path, (2e9, 2e9))
    assert simulation(tmp_path / "run").resume() == 3


# ------------------------------------------------------------------------------------------ over


def test_a_run_that_is_over_stays_over(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    again = simulation(tmp_path / "run", checkpoint_every=2)
    assert again.resume() == 2
    theta = again.theta.clone()
    monkeypatch.setattr(simulate, "play", None)  # no further round
    for rounds in (2, 1):
        assert list(again.run(rounds, progress=False)) == []
    assert torch.equal(again.theta, theta)
    assert again.evaluate()["accuracy"] > 0.25


def test_a_run_that_ended_for_want_of_updates_stays_ended_until_it_is_given_more_patience(tmp_path):
    silent = {"uplink": AnalogUplink(MultipleAccess(), 50.0), "checkpoint_every": 1}
    first = simulation(tmp_path, most_skipped=2, **silent)
    assert len(list(first.run(9, progress=False))) == 2
    second = simulation(tmp_path, most_skipped=2, **silent)
    assert second.resume() == 2
    assert list(second.run(9, progress=False)) == []
    assert second.ended == first.ended != ""
    patient = simulation(tmp_path, most_skipped=4, **silent)
    patient.resume()
    assert [row["round"] for row in patient.run(9, progress=False)] == [3, 4]


def test_the_recipe_resumed_after_its_last_round_says_how_good_it_is(tmp_path, capsys, monkeypatch):
    run = [*FEW, "--rounds", "2", "--checkpoint_every", "1", "--output_dir", str(tmp_path)]
    assert mnist.main(run) == 0
    model = (tmp_path / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "model")
    rows = (tmp_path / "rows.jsonl").read_text()
    monkeypatch.setattr(simulate, "play", None)
    capsys.readouterr()
    assert mnist.main([*run, "--resume"]) == 0
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == model
    assert (tmp_path / "rows.jsonl").read_text() == rows
    accuracy = json.loads(rows.splitlines()[-1])["accuracy"]
    said = capsys.readouterr()
    assert "the run is over, after round 2 of 2: loss" in said.out + said.err
    assert f"accuracy {accuracy:.4f}" in said.out + said.err


# ------------------------------------------------------------------------------------------ stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["the downlink", "local training", "the evaluation"])
def test_a_signal_ends_the_run_after_the_round_under_way_and_nothing_is_lost(
    where, number, tmp_path, monkeypatch, capsys
):
    run = [*FEW, "--rounds", "4", "--checkpoint_every", "9"]
    assert mnist.main([*run, "--output_dir", str(tmp_path / "whole")]) == 0
    place, name = {
        "the downlink": (SelectionDownlink, "send"),
        "local training": (federated.round.LocalTraining, "updates"),
        "the evaluation": (simulate, "evaluate"),
    }[where]
    calls, work = [], getattr(place, name)

    def signalled(*given, **named):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(number)
        return work(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, signalled)
        assert mnist.main([*run, "--output_dir", str(tmp_path / "cut")]) == 128 + number
    assert f"stopped after round 2; saved in '{tmp_path / 'cut' / 'checkpoint-00000002'}'" in capsys.readouterr().err
    assert mnist.main([*run, "--output_dir", str(tmp_path / "cut"), "--resume"]) == 0
    assert_same(tmp_path / "cut", tmp_path / "whole")


def assert_same(one, other):
    first, second = (folder / "model" / "model.safetensors" for folder in (one, other))
    assert first.read_bytes() == second.read_bytes()
    rounds = [json.loads(line)["round"] for line in (one / "rows.jsonl").read_text().splitlines()]
    assert rounds == list(range(1, len(rounds) + 1))


@pytest.mark.parametrize("where", ["play", "evaluate"])
def test_one_that_ends_it_at_once_says_what_is_saved(where, tmp_path, monkeypatch, capsys):
    """Where what is remembered is half moved, only the last checkpoint is a whole round."""
    run = [*FEW, "--rounds", "5", "--checkpoint_every", "2"]
    assert mnist.main([*run, "--output_dir", str(tmp_path / "whole")]) == 0
    calls, work = [], getattr(simulate, where)

    def interrupted(*given, **named):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return work(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(simulate, where, interrupted)
        assert mnist.main([*run, "--output_dir", str(tmp_path / "cut")]) == 130
    saved = 2 if where == "play" else 4
    said = capsys.readouterr().err
    assert f"saved in '{tmp_path / 'cut' / f'checkpoint-0000000{saved}'}', go on with --resume" in said
    assert "Traceback" not in said
    assert mnist.main([*run, "--output_dir", str(tmp_path / "cut"), "--resume"]) == 0
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_stopped_before_anything_is_saved_it_says_so(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(simulate, "play", interrupted)
        assert mnist.main([*FEW, "--output_dir", str(tmp_path)]) == 130
    assert "stopped before a round was saved" in capsys.readouterr().err
    monkeypatch.setattr(mnist, "open_data", interrupted)
    assert mnist.main([*FEW, "--output_dir", str(tmp_path / "other")]) == 130
    assert "no round was being played, nothing is lost" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ nothing runs that is data


def test_no_reader_of_files_runs_what_it_reads():
    """Every call that could unpickle says that it must not, in the package and in the recipes."""
    wanted, found = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}, 0
    for path in [*REPOSITORY.glob("federated/**/*.py"), *REPOSITORY.glob("recipes/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [name.name for name in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "joblib", "dill", "cloudpickle", "marshal", "shelve"} & set(names), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in wanted:
                name, value = wanted[ast.unparse(node.func)]
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                assert isinstance(given.get(name), ast.Constant), f"{path}:{node.lineno}"
                assert given[name].value is value
                found += 1
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_pretrained"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                ours = "trust_remote_code" in given or None in given
                assert ours or "federated" not in str(path.relative_to(REPOSITORY)), f"{path}:{node.lineno}"
    assert found >= 2


def test_an_array_of_objects_is_refused(tmp_path):
    np.save(tmp_path / "rows.npy", np.array([[Path("code")]], dtype=object), allow_pickle=True)
    from federated.market.features import open_rows

    with pytest.raises(ValueError, match="rows.npy' can't be opened"):
        open_rows(str(tmp_path / "rows.npy"))

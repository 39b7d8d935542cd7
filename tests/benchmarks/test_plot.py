"""Pictures are drawn from rows alone, and every optimizer in them can be read."""

import itertools
import json

import matplotlib.pyplot as plt
import pytest

from benchmarks import harness, plot
from benchmarks.suites import SUITES


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Rows of the suites that pictures are drawn of, by no run."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    rows = []
    for name in ("instruct", "sensitivity"):
        suite = SUITES[name]
        for number, optimizer in enumerate(suite.optimizers):
            for lr in suite.rates_of("instruct", optimizer):
                for seed in suite.seeds:
                    numbers = {"metric": -2.5 - number / 1000, "eval_loss": 2.5 + number / 1000, "cpu_seconds": 15.0}
                    held = {"state_ratio": 1 / (number + 1), "state_bytes": 10**6 // (number + 1)}
                    curves = {"losses": [3.0 - i / 10 for i in range(15)]}
                    curves |= {"recovery_errors": [0.5] * 15} if "sketch_size" in optimizer else {}
                    own = {"optimizer": optimizer, "lr": lr, "seed": seed}
                    rows.append({**suite.settings[0]._asdict(), **own, **numbers, **held, **curves})
    (tmp_path / "quality.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("picture", plot.PICTURES)
def test_a_picture_is_drawn(results, picture):
    plot.main([picture, "--output", str(results / "docs" / "picture.png")])
    assert (results / "docs" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_rows_is_refused(results, monkeypatch):
    with pytest.raises(ValueError, match="no row has recovery errors yet"):
        plot.draw_recovery(plt, [], [])


@pytest.mark.parametrize("heights", [[0.5] * 15, [0.99] * 15, [0.0] * 15, [i / 14 for i in range(15)]])
def test_labels_stand_apart_and_in_the_order_of_their_points(heights):
    figure, axis = plt.subplots()
    axis.set_ylim(0, 1)
    plot.label_beside(axis, [(0.5, y, str(i), "black") for i, y in enumerate(heights)])
    placed = [text.xyann[1] for text in axis.texts]
    assert [text.get_text() for text in axis.texts] == [str(i) for i in range(15)]
    assert all(upper - lower > 0.05 for lower, upper in itertools.pairwise(placed))
    assert placed[-1] <= 1.01
    plt.close(figure)


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        ("adamw", "AdamW"),
        ("galore(rank=8, scale=1.0, update_proj_gap=50)", "GaLore r=8"),
        ("apollo(rank=8, scale='auto')", "APOLLO r=8"),
        ("sgc(sketch_size=32, moments='whitened')", "SGC k=32 whitened"),
        ("sgc(min_size=1024)", "SGC min_size=1024"),
        ("adamw(betas=(0.0, 0.999))", "AdamW betas=(0.0, 0.999)"),
    ],
)
def test_optimizers_are_named_for_people(optimizer, name):
    assert plot.label(optimizer) == name


def test_every_optimizer_of_the_core_has_a_name_and_no_two_the_same():
    names = [plot.label(optimizer) for suite in SUITES.values() for optimizer in dict.fromkeys(suite.optimizers)]
    assert not any("_" in name.split()[0] for name in names)
    for suite in SUITES.values():
        assert len({plot.label(optimizer) for optimizer in suite.optimizers}) == len(suite.optimizers)


def test_a_command_that_can_not_be_done_ends_in_a_sentence_and_code_2(results, monkeypatch, capsys):
    (results / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["plot.py"])
    for arguments in (["time", "--output", str(results / "file" / "a.png")], ["front", "--output", "/dev/null/a.png"]):
        with pytest.raises(SystemExit) as ended:
            harness.said(lambda arguments=arguments: plot.main(arguments))
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("plot.py: ")
        assert err.count("\n") == 1

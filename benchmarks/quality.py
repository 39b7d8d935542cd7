"""Does it learn as well? Each optimizer at its best learning rate, on the same data, steps and seeds.

    python benchmarks/quality.py --suite instruct --dry-run  # what it costs, in pieces of at most an hour
    python benchmarks/quality.py --suite instruct            # one piece; the same command goes on with the next
    python benchmarks/quality.py --suite instruct --table    # the table so far, and what is missing
    python benchmarks/quality.py --suite instruct --batch-size 8 64 256 --equal tokens --optimizers adamw "sgc()"
    python benchmarks/quality.py --write docs/results.md     # the tables of the page, from today's rows
    python benchmarks/quality.py --model MODEL --dataset DATA --optimizers adamw "sgc()" "lora(rank=8)" --lr 1e-4 3e-4
    python benchmarks/quality.py --config recipes/configs/commonsense_llama3_8b.yaml

A cell is (task, steps, batch size, optimizer, lr, seed, training rows, length). The learning rate is chosen on seed 0,
on the validation split, from a grid of the same size for every optimizer; then seeds 1 and 2 run at it, and the test
split is what is reported. Several processes may share the work. MODEL is a folder or a name of the hub; DATA a file, a
folder with train and test files, or a name of the hub, read as `recipes/finetune.py` reads it. The optimizers are those
of `benchmarks/peers.py`.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness, peers
from benchmarks.harness import add_row, claim, provenance, rows
from benchmarks.suites import OWN, SUITES, Setting, Suite, altered, gpu_hours, own_suite, read_config
from benchmarks.tables import VALIDATION, Row, chosen_on, fill, inside, rate_table, score, setting_of, table, title
from benchmarks.tasks import CURVE_POINTS, Batch, Source, Task, open_task, to_pretrain

RESULT = "quality"
PROBE_EVERY = 10  # steps from one note of loss and recovery error to the next
MICRO_TOKENS = 8192  # of a batch that go forward and backward together
PIECE_MINUTES = 60.0
SAME_ARITHMETIC = {"adamw": "adamw_fused"}  # faster on a CPU than torch's default


class Cell(NamedTuple):
    """One training run."""

    task: str
    steps: int
    batch_size: int
    optimizer: str  # "adamw", "frozen", "sgc(chunk_size=256, …)", "attached(sample_every=8, micro_batches=8, …)"
    lr: float
    seed: int
    train_rows: int = 0  # 0: all
    length: int = 0  # tokens of a row; 0: the task's own

    @classmethod
    def of(cls, row: Row) -> Cell:
        """Return the cell of a row; older rows have no length."""
        return cls(**{name: row[name] for name in cls._fields if name in row})

    def key(self) -> str:
        """Name the cell in a file name."""
        return "-".join(str(part) for part in (self if self.length else self[:-1])).replace(" ", "")

    @property
    def setting(self) -> Setting:
        """Return what is the same for every optimizer."""
        return Setting(self.task, self.steps, self.batch_size, self.train_rows, self.length)


# ---- one cell --------------------------------------------------------------------------------------------------------


def make_optimizer(spec: str, model: torch.nn.Module, lr: float) -> peers.Made:
    """Build the optimizer that a spec such as "sgc(sketch_size=8)" names, with no weight decay."""
    return peers.make(SAME_ARITHMETIC.get(spec, spec), model, lr)


def parts_of(batch: Batch, micro_batches: int = 1) -> list[tuple[Batch, float]]:
    """Cut a batch into micro-batches, each with the weight of its mean loss in the batch's.

    Args:
        batch: tensors of one row per example.
        micro_batches: wanted; there are more where they would have over MICRO_TOKENS tokens, fewer where rows are few.
    """
    rows, tokens = batch["input_ids"].shape
    size = min(math.ceil(rows / micro_batches), max(1, MICRO_TOKENS // tokens))
    cut = zip(*(values.split(size) for values in batch.values()), strict=True)
    parts = [dict(zip(batch, part, strict=True)) for part in cut]
    # a language model's loss is the mean over the labels that it predicts: all but the first of a row, and none at -100
    labels = [part["labels"] if part["labels"].dim() == 1 else part["labels"][:, 1:] for part in parts]
    borne = [int((each != -100).sum()) for each in labels]
    return [(part, each / max(1, sum(borne))) for part, each in zip(parts, borne, strict=True) if each]


def run_cell(cell: Cell, task: Task) -> dict[str, Any]:
    """Train one cell, and judge it on the validation and the test split.

    10 % linear warm-up, then linear decay to zero. "curve" has the validation loss at each tenth of the steps.
    """
    optimizer, model, micro_batches = make_optimizer(cell.optimizer, task.model(cell.seed), cell.lr)
    assert model is not None  # a model went in
    warmup = max(1, cell.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, (cell.steps - t) / max(1, cell.steps - warmup))
    )
    torch.manual_seed(1000 + cell.seed)
    model.train()
    losses: list[float] = []
    errors: list[float] = []
    curve: list[float] = []
    start, start_cpu = time.perf_counter(), time.process_time()
    for step, batch in zip(range(cell.steps), task.batches(cell.batch_size, cell.seed), strict=False):
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros(())
        # what updates in backward would update at every micro-batch, so it gets the batch at once
        whole = getattr(optimizer, "updates_in_backward", False)
        for part, weight in [(batch, 1.0)] if whole else parts_of(batch, micro_batches):
            part_loss = model(**part).loss * weight
            part_loss.backward()
            loss += part_loss.detach().cpu()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % PROBE_EVERY == 0 and math.isfinite(error := _recovery_error(optimizer)):
            errors.append(round(error, 4))
        if not math.isfinite(losses[-1]):
            break
        due = (step + 1) * CURVE_POINTS // cell.steps - len(curve)
        if due:
            paused, paused_cpu = time.perf_counter(), time.process_time()
            curve += [round(task.validation_loss(model), 4)] * due
            model.train()
            start += time.perf_counter() - paused
            start_cpu += time.process_time() - paused_cpu
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    validation = task.evaluate(model, "validation")
    parameters = sum(parameter.numel() for parameter in task_parameters(model))
    held = peers.state_bytes(optimizer)
    return {
        **cell._asdict(),
        **task.evaluate(model, "test"),
        "chosen_on": VALIDATION,
        "validation_metric": validation["metric"],
        "validation_loss": validation["eval_loss"],
        "curve": curve,
        "train_loss_last": statistics.fmean(losses[-max(1, len(losses) // 10) :]),
        "losses": [round(statistics.fmean(losses[i : i + PROBE_EVERY]), 4) for i in range(0, len(losses), PROBE_EVERY)],
        **({"recovery_errors": errors} if errors else {}),
        "state_bytes": held,
        "state_ratio": held / (8 * parameters),
        "parameters": parameters,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def task_parameters(model: torch.nn.Module) -> Iterable[torch.nn.Parameter]:
    """Yield the parameters of the model itself, without adapters or copies put into it."""
    return (p for name, p in model.named_parameters() if "lora_" not in name and "original_module" not in name)


def _recovery_error(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.stats()["recovery_error"]) if hasattr(optimizer, "stats") else math.nan


def run_cells(
    cells: list[Cell],
    result: str = RESULT,
    *,
    suite: Suite | None = None,
    sources: dict[str, Source] | None = None,
    pace: Pace | None = None,
    until: float = math.inf,
) -> None:
    """Run the cells that nobody has run or is running, and print how long it will take.

    Args:
        cells: to run.
        result: name of the file of rows.
        suite: that they are part of, for the estimate.
        sources: tasks of the user's own, by name.
        pace: what cells have taken; None: what the rows say.
        until: time of `time.perf_counter` by which to be done; a piece's first cell runs however long it takes.
    """
    pace = Pace(result) if pace is None else pace
    for number, cell in enumerate(cells):
        if pace.noted and time.perf_counter() + pace.expect([cell]) > until:
            return
        with claim(result, cell.key()) as mine:
            if not mine or cell.key() in done(result):
                continue
            start = time.perf_counter()
            row = run_cell(cell, _open(cell.task, cell.train_rows, cell.length, tuple((sources or {}).values())))
            if suite is not None:
                row |= _choice(suite, cell, result)
            row["seconds_in_all"] = round(time.perf_counter() - start, 1)
            add_row(result, row)
            pace.note(cell, row["seconds_in_all"])
            left = cells[number + 1 :] if suite is None else to_come(suite, result)
            print(
                f"{title(cell.setting)} {cell.optimizer} lr {cell.lr:g} seed {cell.seed}: "
                f"validation {row['validation_metric']:.4f} test {row['metric']:.4f} "
                f"train {row['train_loss_last']:.3f} ({row['seconds']:.0f} s, "
                f"{len(left)} runs left, about {pace.expect(left) / 60:.0f} min)",
                flush=True,
            )


def _choice(suite: Suite, cell: Cell, result: str) -> Row:
    """Return the grid of a cell's rate, and of a rate that was chosen whether it lay inside."""
    rates = suite.rates_of(cell.task, cell.optimizer)
    return {"rates": rates} | ({"rate_inside_grid": inside(cell.lr, rates)} if cell.seed != suite.seeds[0] else {})


@functools.lru_cache(maxsize=4)
def _open(name: str, train_rows: int, length: int, sources: tuple[Source, ...]) -> Task:
    return open_task(name, train_rows, {source.name: source for source in sources}, length)


class Pace:
    """How long cells take here, by the rows of this machine, or of any where it has none.

    That of the same optimizer and setting if known, else of the same setting; else the same task's by rows trained on,
    else any's.
    """

    def __init__(self, result: str) -> None:
        self.noted = 0  # cells that this process has run
        self.machine = provenance()["machine"]
        known = rows(result)
        self.measured_here = any(row.get("machine") == self.machine for row in known)
        self.seen: list[tuple[str, Setting, float]] = [
            (row["optimizer"], setting_of(row), row.get("seconds_in_all", row["seconds"]))
            for row in known
            if not self.measured_here or row.get("machine") == self.machine
        ]

    def note(self, cell: Cell, seconds: float) -> None:
        """Record how long a cell took."""
        self.noted += 1
        self.seen.append((cell.optimizer, cell.setting, seconds))

    def expect(self, cells: Iterable[Cell]) -> float:
        """Return the seconds that cells will take."""
        return sum(self._expect(cell) for cell in cells)

    def knows(self, cell: Cell) -> bool:
        """Return whether a cell of the same setting has run."""
        return any(setting == cell.setting for _, setting, _ in self.seen)

    def _expect(self, cell: Cell) -> float:
        near = [(name, seconds) for name, setting, seconds in self.seen if setting == cell.setting]
        if near:
            same = [seconds for name, seconds in near if name == cell.optimizer]
            return statistics.median(same or [seconds for _, seconds in near])
        each = [(setting.task, seconds / setting.tokens) for _, setting, seconds in self.seen]
        same_task = [seconds for task, seconds in each if task == cell.task]
        return cell.setting.tokens * statistics.median(same_task or [seconds for _, seconds in each] or [0.0])


def found(result: str = RESULT) -> list[Row]:
    """Return the rows, one per cell and per split that rates are chosen on."""
    return list({(chosen_on(row), Cell.of(row).key()): row for row in rows(result)}.values())


def done(result: str = RESULT) -> dict[str, Row]:
    """Return the finished cells by key: those with a validation split, older ones are no part of a choice."""
    return {Cell.of(row).key(): row for row in rows(result) if chosen_on(row) == VALIDATION}


def missing(suite: Suite, result: str = RESULT) -> list[Cell]:
    """List the cells still to run: for each optimizer its grid of rates on the first seed, or else its other seeds.

    The other seeds of an optimizer are known when its grid is done; until then they are not listed.
    """
    known = done(result)
    cells = []
    for optimizer in suite.optimizers:
        for task, steps, batch_size, train_rows, length in suite.settings:
            rates = suite.rates_of(task, optimizer)
            first = [Cell(task, steps, batch_size, optimizer, lr, suite.seeds[0], train_rows, length) for lr in rates]
            todo = [cell for cell in first if cell.key() not in known]
            if not todo:
                best = max(first, key=lambda cell: score(known[cell.key()]))
                todo = [best._replace(seed=seed) for seed in suite.seeds[1:]]
            cells += [cell for cell in todo if cell.key() not in known]
    return cells


def to_come(suite: Suite, result: str = RESULT) -> list[Cell]:
    """List the missing cells in the order in which they run, and after every grid as many as its other seeds will be.

    Which rate those will have is not known yet; the last one of the grid stands for it.
    """
    listed: list[Cell] = []
    for optimizer in suite.optimizers:
        cells = missing(suite._replace(optimizers=(optimizer,)), result)
        grids = {cell.setting: cell for cell in cells if cell.seed == suite.seeds[0]}
        listed += cells + [cell._replace(seed=seed) for cell in grids.values() for seed in suite.seeds[1:]]
    return listed


def pieces(cells: list[Cell], pace: Pace, seconds: float) -> list[list[Cell]]:
    """Divide cells, in their order, into pieces that take no longer than `seconds`; a longer cell is its own piece."""
    divided: list[list[Cell]] = []
    for cell in cells:
        if divided and pace.expect([*divided[-1], cell]) <= seconds:
            divided[-1].append(cell)
        else:
            divided.append([cell])
    return divided


def costs(suite: Suite, result: str = RESULT, minutes: float = PIECE_MINUTES) -> str:
    """Return how long the missing runs will take, piece by piece."""
    pace, cells = Pace(result), to_come(suite, result)
    lines = [
        f"{name}: its model is pretrained first, {steps} steps, half an hour at most"
        for name in dict.fromkeys(cell.task for cell in cells)
        if (steps := to_pretrain(name))
    ]
    for number, piece in enumerate(pieces(cells, pace, 60 * minutes), 1):
        runs = Counter((title(cell.setting), cell.optimizer) for cell in piece)
        what = "; ".join(f"{count} × {optimizer} on {where}" for (where, optimizer), count in runs.items())
        lines.append(f"piece {number}, about {pace.expect(piece) / 60:.0f} min: {what}")
    guessed = sum(not pace.knows(cell) for cell in cells)
    by = f"by {len(pace.seen)} rows of {'this machine' if pace.measured_here else 'other machines'}"
    lines.append(f"{len(cells)} runs, about {pace.expect(cells) / 60:.0f} min in all, {by}; {guessed} of them guessed")
    return "\n".join(lines)


def run_suite(
    suite: Suite,
    result: str = RESULT,
    *,
    reverse: bool = False,
    sources: dict[str, Source] | None = None,
    seconds: float = math.inf,
) -> None:
    """Run all that is missing and that nobody else is running: optimizer by optimizer, its grid, then its other seeds.

    Args:
        suite: to run.
        result: name of the file of rows.
        reverse: start with the last optimizer.
        sources: tasks of the user's own, by name.
        seconds: after which no cell should be running any more.
    """
    pace, until = Pace(result), time.perf_counter() + seconds
    before: list[Cell] = []
    while (cells := missing(suite, result)) and cells != before:
        before = cells
        for optimizer in suite.optimizers[::-1] if reverse else suite.optimizers:
            for _ in ("grid", "seeds"):
                one = missing(suite._replace(optimizers=(optimizer,)), result)
                run_cells(one, result, suite=suite, sources=sources, pace=pace, until=until)


def report(suite: Suite, result: str = RESULT) -> str:
    """Return the tables, and what is missing, as Markdown."""
    known = found(result)
    parts = [table(suite, known), rate_table(suite, known)]
    if left := to_come(suite, result):
        names = ", ".join(dict.fromkeys(f"{cell.optimizer} on {title(cell.setting)}" for cell in left))
        parts.append(f"{len(left)} runs are missing, about {Pace(result).expect(left) / 60:.0f} min: {names}")
    else:
        parts.append("No run is missing.")
    return "\n\n".join(parts)


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Read the command line: the benchmark's own words, and for --model those of `recipes/finetune.py`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--suite", choices=SUITES, nargs="+", default=["instruct"])
    parser.add_argument("--config", type=Path, help="YAML file of a suite on a model and data of your own")
    parser.add_argument("--model", help="folder or hub name; more arguments of recipes/finetune.py may follow")
    parser.add_argument("--dataset", help="file, folder or hub name")
    parser.add_argument("--eval-datasets", nargs="+", help="sets to judge by, the score is the mean")
    parser.add_argument("--optimizers", nargs="+", help="as in benchmarks/peers.py")
    parser.add_argument("--lr", nargs="+", type=float, help="learning rates that each optimizer chooses from")
    parser.add_argument("--steps", type=int, help="with --equal tokens: of the suite's own batch size and length")
    parser.add_argument("--batch-size", nargs="+", type=int, help="rows of a step; cut into micro-batches inside")
    parser.add_argument("--length", nargs="+", type=int, help="tokens of a row")
    parser.add_argument("--equal", choices=("steps", "tokens"), default="steps", help="what batch sizes have in common")
    parser.add_argument("--train-rows", type=int, help="training rows to use; 0: all")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--result", help="name of the file in benchmarks/results; own suites: quality-own")
    parser.add_argument("--table", action="store_true", help="print the table and what is missing, run nothing")
    parser.add_argument("--dry-run", action="store_true", help="print what the missing runs will cost, run nothing")
    parser.add_argument("--minutes", type=float, default=PIECE_MINUTES, help="of a piece, after which the command ends")
    parser.add_argument("--write", type=Path, nargs="+", help="pages whose tables to draw anew, run nothing")
    parser.add_argument("--gpu-hours", action="store_true", help="print what a configuration would take, run nothing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reverse", action="store_true", help="start from the other end, beside another process")
    arguments, rest = parser.parse_known_args(argv)
    config = read_config(arguments.config) if arguments.config else {}
    if arguments.model or arguments.dataset:
        config.pop("name", None)  # it was another's
    named = {"model_name_or_path": arguments.model, "dataset": arguments.dataset}
    config |= {name: value for name, value in named.items() if value is not None}
    if rest and not config:
        parser.error(f"without --model or --config there is no argument {rest[0]}")
    if len(rest) % 2 or any(not word.startswith("--") for word in rest[::2]):
        parser.error(f"arguments of recipes/finetune.py must be pairs of --name and value, got {' '.join(rest)}")
    config |= {word[2:].replace("-", "_"): value for word, value in zip(rest[::2], rest[1::2], strict=True)}
    if config:
        named = {name: value for name, value in vars(arguments).items() if name in OWN}
        named |= {"learning_rates": arguments.lr}
        config |= {name: value for name, value in named.items() if value is not None}
    return arguments, config


def main(argv: list[str] | None = None) -> None:
    """Run what is missing of a suite, or print its table."""
    arguments, config = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.write:
        for page in arguments.write:
            page.write_text(fill(page.read_text(encoding="utf-8"), found()), encoding="utf-8")
        return
    if config:
        own = own_suite(config)
        if arguments.gpu_hours:
            for name, hours in gpu_hours(own).items():
                print(f"{hours:6.1f} GPU-hours  {name}")
            return
        suites, sources, result = [own.suite], {own.source.name: own.source}, arguments.result or "quality-own"
    else:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # these models and data are files
        suites = [
            altered(
                SUITES[name],
                optimizers=arguments.optimizers,
                rates=arguments.lr,
                seeds=arguments.seeds,
                steps=arguments.steps,
                train_rows=arguments.train_rows,
                batch_sizes=arguments.batch_size,
                lengths=arguments.length,
                equal=arguments.equal,
            )
            for name in arguments.suite
        ]
        sources, result = {}, arguments.result or RESULT
    end = time.perf_counter() + 60 * arguments.minutes
    for suite in suites:
        if arguments.dry_run:
            print(costs(suite, result, arguments.minutes), flush=True)
            continue
        if not arguments.table:
            seconds = end - time.perf_counter()
            run_suite(suite, result, reverse=arguments.reverse, sources=sources, seconds=seconds)
        print(report(suite, result), flush=True)


if __name__ == "__main__":
    harness.said(main)

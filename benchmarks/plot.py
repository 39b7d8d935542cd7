"""Draw a quality suite: score against optimizer state, one panel per setting.

python benchmarks/plot.py --suite glue --output docs/quality-glue.png
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.quality import SUITES, best_runs, done

COLORS = {"sgc": "#0b6e4f", "adamw": "#c1440e", "frozen": "#7a7a7a"}


def main() -> None:
    """Draw the suite."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="glue")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    suite = SUITES[arguments.suite]
    found = list(done().values())
    figure, axes = plt.subplots(1, len(suite.settings), figsize=(4.4 * len(suite.settings), 3.8), squeeze=False)
    for axis, setting in zip(axes[0], suite.settings, strict=True):
        for optimizer in suite.optimizers:
            runs = best_runs(found, setting, optimizer, suite)
            if not runs:
                continue
            scores = [run["metric"] for run in runs]
            ratio = max(runs[0]["state_ratio"], 1e-4)
            color = COLORS[optimizer.split("(")[0]]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            axis.errorbar(ratio, statistics.fmean(scores), yerr=spread, fmt="o", color=color, capsize=3)
            axis.annotate(
                optimizer.replace("sketch_size", "k").replace("sparsity", "s").replace("recovered", "s'"),
                (ratio, statistics.fmean(scores)),
                textcoords="offset points",
                xytext=(-7, 4) if ratio > 0.2 else (7, 4),
                ha="right" if ratio > 0.2 else "left",
                fontsize=7,
                color=color,
            )
        task, steps, batch_size, rows = setting
        axis.set_xscale("log")
        axis.set_xlim(5e-5, 3)
        axis.margins(y=0.15)
        axis.set_title(f"{task}: {steps} steps of {batch_size}" + f", {rows} rows" * bool(rows), fontsize=10)
        axis.set_xlabel("optimizer state ÷ AdamW's in fp32")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("score (mean, ± sd over seeds)")
    figure.tight_layout()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, dpi=150)


if __name__ == "__main__":
    main()

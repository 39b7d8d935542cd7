"""A plan as a table and as a picture."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from sgc.planner.models import PlanError
from sgc.planner.trace import KINDS

if TYPE_CHECKING:
    from sgc.planner.plan import Plan, Row

GREEN, PLAIN = "\033[32m", "\033[0m"
UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
COLORS = ("#4c566a", "#c1440e", "#0b6e4f", "#d9a441", "#9a8fb0")


def table(plan: Plan, color: bool) -> str:
    """Lay a plan out: a line on what it is of, one line per optimizer, one on what fits."""
    name, unit = _unit(plan)
    width = max(len(row.optimizer) for row in plan.rows)
    header = ["state", "weights", "gradients", "state", "activations", "temporaries", "peak"]
    widths = [max(len(title), 7) for title in header]
    over = " " * (width + 2 + widths[0]) + "  " + f"at the peak, {name} on each device".center(sum(widths[1:]) + 10)
    titles = "  ".join(title.rjust(size) for title, size in zip(header, widths, strict=True))
    lines = [_of(plan), "", over.rstrip(), f"{'optimizer'.ljust(width)}  {titles}"]
    lines += [_line(row, width, widths, unit, color) for row in plan.rows]
    return "\n".join([*lines, *_notes(plan, name, unit)])


def _line(row: Row, width: int, widths: list[int], unit: int, color: bool) -> str:
    if row.at_peak is None:
        return f"{row.optimizer.ljust(width)}  {row.note}"
    cells = [row.state, *row.at_peak, row.at_peak.total]
    numbers = "  ".join(_number(cell / unit).rjust(size) for cell, size in zip(cells, widths, strict=True))
    line = f"{row.optimizer.ljust(width)}  {numbers}{'  fits' if row.fits else ''}"
    return f"{GREEN}{line}{PLAIN}" if color and row.fits else line


def _number(size: float) -> str:
    return "0" if size == 0 else f"{size:.3f}" if size < 1 else f"{size:.2f}" if size < 100 else f"{size:.0f}"


def _unit(plan: Plan) -> tuple[str, int]:
    largest = max((row.peak or 0 for row in plan.rows), default=0)
    return next((pair for pair in UNITS if largest >= pair[1]), UNITS[-1])


def _of(plan: Plan) -> str:
    said = [f"{plan.model} ({plan.architecture}): {plan.parameters:,} parameters in {plan.dtype}"]
    said.append(f"{plan.batch_size} × {plan.sequence_length} tokens")
    said += ["gradient checkpointing"] * plan.gradient_checkpointing + ["chunked loss"] * (plan.loss == "chunked")
    if plan.world_size > 1:
        said.append(f"{plan.world_size} devices, {plan.strategy}")
    if plan.budget is not None:
        said.append(f"{plan.budget / 1e9:.1f} GB of memory, of which {plan.reserve / 1e9:.1f} are kept free")
    return ", ".join(said)


def _notes(plan: Plan, name: str, unit: int) -> list[str]:
    notes = ["", "state: all that the optimizer ever holds, compressed gradients counted."]
    if plan.budget is not None:
        gradients = {"largest_sketch": "whole gradients", "largest_compressed_sketch": "compressed gradients"}
        for which, k in plan.sketches.items():
            found = f"sketch_size={k} of 256" if k is not None else "none"
            notes.append(f"largest sketch that fits, with {gradients[which]}: {found}")
    if plan.unreached:
        notes.append(
            f"no token reaches {plan.unreached:,} of the parameters, as those for images: their gradients and state "
            "are counted, activations of theirs are not."
        )
    if any(row.estimated for row in plan.rows):
        notes.append("estimates: buckets, gathered layers and gradients on their way; state and shards are exact.")
    return notes


def check_plot(path: str | Path) -> None:
    """Refuse a path that no plot can be written to.

    Raises:
        ImportError: matplotlib is not there.
        PlanError: the path can't be written, or matplotlib draws no such file.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError('a plot needs matplotlib: pip install "sgc[hf]"') from error
    suffix, known = Path(path).suffix.lower(), [f".{name}" for name in FigureCanvasBase.get_supported_filetypes()]
    if suffix not in known:
        raise PlanError(f"a plot must be a file that ends in one of {', '.join(sorted(known))}, got {str(path)!r}")
    there = os.path.lexists(path)
    if there and not os.path.isfile(path):
        raise PlanError(f"the plot {str(path)!r} can't be written: there is something that is no file")
    try:
        with open(path, "ab"):  # which leaves what is there as it is
            pass
        if not there:
            os.unlink(path)
    except (OSError, ValueError) as error:  # no right to it, no folder to put it in, no name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PlanError(f"the plot {str(path)!r} can't be written: {reason}") from error


def save_plot(plan: Plan, path: str | Path) -> None:
    """Draw stacked bars, one per optimizer, and the budget."""
    check_plot(path)
    from matplotlib.figure import Figure

    name, unit = _unit(plan)
    rows = [row for row in reversed(plan.rows) if row.at_peak is not None]
    if not rows:
        raise PlanError("there is nothing to draw: none of the optimizers is possible")
    figure = Figure(figsize=(8.5, 0.34 * len(rows) + 1.4), layout="constrained")
    axis = figure.subplots()
    labels = [row.optimizer for row in rows]
    left = [0.0] * len(rows)
    for kind, shade in zip(KINDS, COLORS, strict=True):
        sizes = [getattr(row.at_peak, kind) / unit for row in rows]
        axis.barh(labels, sizes, left=left, color=shade, label=kind, height=0.7)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    for row, end in zip(rows, left, strict=True):
        axis.annotate(f"  {_number(end)}", (end, row.optimizer), va="center", fontsize=7, zorder=4)
    if plan.budget is not None:
        axis.axvline((plan.budget - plan.reserve) / unit, color="0.6", linestyle="--", linewidth=1, zorder=0)
    axis.set_xlabel(f"{name} on each device at the peak")
    figure.suptitle("\n".join(textwrap.wrap(_of(plan), 110)), fontsize=8, parse_math=False)
    axis.tick_params(labelsize=8)
    axis.margins(x=0.08)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, ncols=5, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.9 / len(rows)))
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:  # as of a disk that is full
        raise PlanError(f"the plot {str(path)!r} can't be written: {error.strerror or error}") from error

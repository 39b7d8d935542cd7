"""What a run is judged by: bytes held, a table, the loss curves, files written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from sgc.hf import tensor_bytes

ADAMW_BYTES_PER_PARAMETER = 8  # two moments in fp32


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterable[torch.Tensor]:
    """Yield the tensors inside dicts, lists and the objects that some optimizers keep in their state."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from tensors_in(vars(value), seen)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return what an optimizer holds: by its own count, else all tensors in its state."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if hasattr(inner, "state_bytes"):
        return int(inner.state_bytes())
    return tensor_bytes(tensors_in(dict(inner.state)))


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically; numbers that JSON has not (NaN and the infinities) become null."""
    text = json.dumps(finite(content), indent=2, default=str, allow_nan=False)
    write_atomically(path, lambda p: p.write_text(text + "\n", encoding="utf-8"))


def finite(value: Any) -> Any:
    """Return the value with None for every number inside that is not finite."""
    if isinstance(value, dict):
        return {finite(name): finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def megabytes(count: int | None) -> str:
    """Return bytes in words, such as "3.29 MB"; a dash for what was not measured."""
    if count is None:
        return "–"
    return f"{count / 1e6:,.2f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def table(rows: list[list[str]]) -> str:
    """Lay out rows of cells, the first row a heading, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])


def report(results: dict[str, Any]) -> str:
    """Return the tables of quality and of memory, before and after every run.

    Args:
        results: with "before" (metric → value, or empty where nothing was judged before) and "runs" (each with "name",
            "after", "seconds", "memory").
    """
    metrics = list(results["runs"][0]["after"])
    quality = [["", *(m.replace("_", " ") for m in metrics), "steps", "time"]]
    if results["before"]:
        quality.append(["before", *(f"{results['before'][m]:.3f}" for m in metrics), "", ""])
    memory = [["memory", "weights", "gradients", "optimizer state", "against AdamW's in fp32"]]
    for run in results["runs"]:
        values = [f"{run['after'][m]:.3f}" for m in metrics]
        quality.append([f"after {run['name']}", *values, f"{run['steps']:,}", f"{run['seconds']:.0f} s"])
        held = run["memory"]
        share = held["optimizer_state"] / held["adamw_state"]
        memory.append(
            [
                run["name"],
                *(megabytes(held[k]) for k in ("weights", "gradients", "optimizer_state")),
                f"{share:.3f} × {megabytes(held['adamw_state'])}",
            ]
        )
    return f"{table(quality)}\n\n{table(memory)}"


def plot_losses(path: Path, runs: list[dict[str, Any]]) -> None:
    """Draw training (line) and test loss (dots) of every run over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, run in enumerate(runs):
        train = [(h["step"], h["loss"]) for h in run["history"] if "loss" in h]
        test = [(h["step"], h["eval_loss"]) for h in run["history"] if "eval_loss" in h]
        if train:
            axes.plot(*zip(*train, strict=True), color=f"C{i}", label=f"{run['name']}, training")
        if test:
            axes.plot(*zip(*test, strict=True), "o--", color=f"C{i}", label=f"{run['name']}, test", markersize=4)
    axes.set(xlabel="step", ylabel="loss (nats per token or example)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda p: figure.savefig(p, dpi=120))
    plt.close(figure)

"""What does a training step hold, of what kind, and when? Real steps, each cell in a process of its own.

    python benchmarks/memory.py --suite small          # measure what results/memory.jsonl does not hold yet
    python benchmarks/memory.py --suite llama-3-8b     # on a GPU of 40 GB or more: under 8 minutes on an H200
    python benchmarks/memory.py --suite small --table  # planned and measured, from the rows
    python benchmarks/memory.py --suite small --plot docs/memory.png --plot-step docs/memory-step.png

A cell makes two steps under the planner's tracker, which sees every tensor, and one without it, for the peak that the
process (VmHWM) or the GPU's allocator reports. Running out of memory is a result: `--limit 2GB` provokes it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness, peers
from benchmarks.harness import add_row, claim, rows
from recipes.report import tensors_in
from sgc.planner import PlanError, plan
from sgc.planner.models import BUILT_IN, DTYPES, load_config, make_model, parse_bytes
from sgc.planner.trace import KINDS, Held, Tracker, checkpointed, loss_of

NAME = "memory"
POINTS = 160  # of the curve that a row keeps
COLORS = dict(zip(KINDS, ("#4c566a", "#c1440e", "#0b6e4f", "#d9a441", "#9a8fb0"), strict=True))


def _llama(hidden: int, layers: int, vocabulary: int, inner: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    more = {"num_attention_heads": hidden // 64, "vocab_size": vocabulary, "max_position_embeddings": 2048}
    return {"model_type": "llama", "tie_word_embeddings": False, **sizes, **more}


# Rows are found by these names, which overstate: the models have 1.1M, 17M and 134M parameters.
MODELS: dict[str, dict[str, Any]] = {
    "llama-1m": _llama(128, 4, 1024, 384),
    "llama-20m": _llama(384, 6, 8192, 1024),
    "llama-160m": _llama(768, 12, 32000, 2048),
}


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    model: str
    optimizer: str
    dtype: str = "fp32"
    batch_size: int = 4
    sequence_length: int = 128
    checkpointing: bool = False
    loss: str = "plain"
    device: str = "cpu"
    limit: str = ""

    @property
    def name(self) -> str:
        """Return the cell's name, for its lock."""
        return "-".join(str(value) for value in asdict(self).values())


OPTIMIZERS = (
    "sgc",
    "sgc(sketch_size=8)",
    "sgc(sketch_size=32)",
    "attached(sample_every=8)",
    "attached(sample_every=32)",
    "attached(sketch_size=8)",
    "sgd",
    "adamw_fused",
    "adamw8bit",
    "adafactor",
    "galore(rank=128)",
    "apollo(rank=256)",
    "lora(rank=8)",
)
LARGE = {"dtype": "bf16", "batch_size": 1, "sequence_length": 2048, "checkpointing": True, "device": "cuda"}
SUITES: dict[str, list[Cell]] = {
    "tiny": [Cell("llama-1m", spec) for spec in OPTIMIZERS],
    "small": [Cell("llama-20m", spec) for spec in OPTIMIZERS],
    "medium": [Cell("llama-160m", spec, batch_size=1, sequence_length=256) for spec in OPTIMIZERS],
    "bf16": [
        Cell("llama-20m", spec, dtype="bf16", checkpointing=True)
        for spec in ("sgc", "sgc(sketch_size=8)", "attached(sample_every=34)", "adamw_fused", "lora(rank=8)")
    ],
    "llama-3-8b": [
        Cell("llama-3-8b", "attached(sample_every=34)", **LARGE),
        Cell("llama-3-8b", "attached(sample_every=34)", loss="chunked", **LARGE),
        Cell("llama-3-8b", "attached(sketch_size=8)", **LARGE),
        *(Cell("llama-3-8b", spec, **LARGE) for spec in ("sgc", "sgd", "adamw8bit", "lora(rank=8)")),
    ],
}


# ---- one cell, in its own process ------------------------------------------------------------------------------------


def measure(cell: Cell, snapshot: Path | None = None) -> dict[str, Any]:
    """Make training steps and return what they held; running out of memory is a result, too."""
    try:
        if cell.limit:
            _limit(cell.device, parse_bytes(cell.limit))
        return {"result": "measured", **_train(cell, snapshot)}
    except (MemoryError, RuntimeError, PlanError) as error:  # torch's CPU allocator raises a plain RuntimeError
        if not _is_out_of_memory(error):
            raise
        return {"result": "out of memory", "reason": str(error).splitlines()[0][:200]}


def _is_out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or any(words in str(error) for words in ("can't allocate memory", "not enough memory"))


def _train(cell: Cell, snapshot: Path | None) -> dict[str, Any]:
    torch.manual_seed(0)
    device = torch.device(cell.device)
    with device:
        model = make_model(_config(cell.model), DTYPES[cell.dtype])
    _randomize(model)
    parameters = sum(param.numel() for param in model.parameters())
    if cell.checkpointing:
        checkpointed(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages, about CPUs and old names
        made = peers.make(cell.optimizer, model, lr=1e-4)
    trained, optimizer = made.model, made.optimizer
    assert trained is not None  # it was given a model
    trained.train()
    config = _config(cell.model)
    batch = torch.randint(0, config.vocab_size, (cell.batch_size, cell.sequence_length), device=device)

    started = time.perf_counter()
    first = _tracked_step(trained, optimizer, batch, cell)
    second = _tracked_step(trained, optimizer, batch, cell)
    idle = _reset_peak(cell.device) - first.left  # of the process without its tensors
    with _history(snapshot):
        _step(trained, optimizer, batch, cell)
    process, seconds = _process_peak(cell.device), time.perf_counter() - started
    peak = max(first.peak, second.peak, key=lambda held: held.total)
    return {
        "parameters": parameters,
        "state_bytes": _most_state(optimizer),
        "peak_bytes": peak.total,
        "at_peak": peak._asdict(),
        "first_step_peak_bytes": first.peak.total,
        "process_bytes": process - idle,
        **_allocator(cell.device),
        "phases": second.phases,
        "curve": second.curve,
        "seconds": seconds,
    }


def _config(name: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**MODELS[name]) if name in MODELS else load_config(name)


@torch.no_grad()
def _randomize(model: nn.Module) -> None:
    """Set weights to the usual size: norms 1, biases 0, the rest of deviation 0.02."""
    for name, param in model.named_parameters():
        if param.dim() > 1:
            param.normal_(std=0.02)
        else:
            param.fill_(0.0 if name.endswith("bias") else 1.0)


@dataclass(frozen=True)
class Tracked:
    """One step as the tracker saw it."""

    peak: Held
    left: int  # bytes held when it is over
    phases: dict[str, float]  # where in the curve backward and the step begin, as shares
    curve: list[list[int]]  # POINTS moments, bytes by kind


def _tracked_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, cell: Cell) -> Tracked:
    gc.collect()
    tracker = Tracker()
    handles = tracker.follow(model)
    for tensor in tensors_in(dict(optimizer.state)):
        tracker.mark(tensor, "state")
    tracker.mark(batch, "activations")
    starts = {}
    with tracker:
        loss = _loss(model, batch, cell)
        starts["backward"] = len(tracker.moments)
        loss.backward()
        del loss
        starts["step"] = len(tracker.moments)
        optimizer.step()
        optimizer.zero_grad()
        tracker.note()
    for handle in handles:
        handle.remove()
    moments = tracker.moments
    left = moments[-1].total
    return Tracked(tracker.peak(), left, {name: at / len(moments) for name, at in starts.items()}, _thinned(moments))


def _thinned(moments: list[Held]) -> list[list[int]]:
    """Thin a curve: keep the highest of each group of moments."""
    size = max(1, -(-len(moments) // POINTS))
    return [list(max(moments[at : at + size], key=lambda held: held.total)) for at in range(0, len(moments), size)]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, cell: Cell) -> None:
    _loss(model, batch, cell).backward()
    optimizer.step()
    optimizer.zero_grad()


def _loss(model: nn.Module, batch: Tensor, cell: Cell) -> Tensor:
    if cell.loss == "chunked" and cell.device == "cuda":
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        except ImportError:
            return loss_of(model, batch, chunked=True)
        whole: Any = model
        hidden = whole.base_model(input_ids=batch, use_cache=False).last_hidden_state
        flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        return LigerFusedLinearCrossEntropyLoss()(whole.lm_head.weight, flat, batch[:, 1:].reshape(-1))
    return loss_of(model, batch, chunked=cell.loss == "chunked")


def _most_state(optimizer: torch.optim.Optimizer) -> int:
    """Count the state, compressed gradients at their fullest included."""
    from sgc import SGC

    return optimizer.expected_state_bytes() if isinstance(optimizer, SGC) else peers.state_bytes(optimizer)


# ---- the machine -----------------------------------------------------------------------------------------------------


def _limit(device: str, size: int) -> None:
    """Limit the memory of this process: on a CPU what it maps beyond now, on a GPU what the allocator takes."""
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
    else:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + size, mapped + size))


def _process_peak(device: str) -> int:
    """Return the most that the process has held of the machine's memory, or of the GPU's by its allocator."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _reset_peak(device: str) -> int:
    """Reset the peak, and return what is held now."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is held now
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def _allocator(device: str) -> dict[str, int]:
    """Return what the GPU's allocator has taken from the driver, fragmentation counted."""
    return {"reserved_bytes": torch.cuda.max_memory_reserved()} if device == "cuda" else {}


class _history:
    """Record the GPU allocator's history and dump it as a file for pytorch.org/memory_viz."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __enter__(self) -> None:
        if self.path is not None:
            torch.cuda.memory._record_memory_history()

    def __exit__(self, *raised: object) -> None:
        if self.path is not None:
            torch.cuda.memory._dump_snapshot(str(self.path))
            torch.cuda.memory._record_memory_history(enabled=None)


# ---- all cells -------------------------------------------------------------------------------------------------------


def run(cells: list[Cell], snapshot: Path | None = None) -> None:
    """Measure every cell that has no row, each in its own process, and store a row for each."""
    for cell in cells:
        if reason := peers.why_not(peers.parse(cell.optimizer)[0]):
            print(f"{cell.model} {cell.optimizer}: left out, {reason}", flush=True)
            continue
        with claim(NAME, cell.name) as ours:
            if not ours or cell in done():
                continue
            row = {**asdict(cell), **_in_subprocess(cell, snapshot), **_planned(cell)}
            add_row(NAME, row)
            print(_said(row), flush=True)


def done() -> dict[Cell, dict[str, Any]]:
    """Return the newest row of every cell."""
    names = Cell.__dataclass_fields__
    return {Cell(**{name: row[name] for name in names}): row for row in rows(NAME)}


def _in_subprocess(cell: Cell, snapshot: Path | None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--cell", json.dumps(asdict(cell))]
    command += ["--snapshot", str(snapshot)] if snapshot is not None else []
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode == 0:
        return json.loads(ended.stdout.splitlines()[-1])
    if ended.returncode == -signal.SIGKILL:  # what Linux does to a process that takes too much
        return {"result": "out of memory", "reason": "killed by SIGKILL"}
    raise RuntimeError(f"{cell} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")


def _planned(cell: Cell) -> dict[str, Any]:
    """Return what the planner predicts for the same step."""
    found = plan(
        _config(cell.model),
        batch_size=cell.batch_size,
        sequence_length=cell.sequence_length,
        gradient_checkpointing=cell.checkpointing,
        dtype=cell.dtype,
        loss=cell.loss,
        optimizers=[cell.optimizer],
    )
    (row,) = found.rows
    return {"planned_state_bytes": row.state, "planned_peak_bytes": row.peak}


def _said(row: dict[str, Any]) -> str:
    what = f"{row['model']:11} {row['dtype']:5} {row['optimizer']:27}"
    if row["result"] != "measured":
        return f"{what} {row['result']}: {row['reason']}"
    ratio = row["planned_peak_bytes"] / row["peak_bytes"]
    return (
        f"{what} peak {row['peak_bytes'] / 1e6:9.1f} MB, planned {ratio:.3f} of it; process "
        f"{row['process_bytes'] / 1e6:8.1f} MB; state {row['state_bytes'] / 1e6:8.2f} MB, planned "
        f"{row['planned_state_bytes'] / 1e6:8.2f}"
    )


def table(cells: list[Cell]) -> Iterator[str]:
    """Yield the lines of a Markdown table of what was planned and measured."""
    found = done()
    yield "| model | optimizer | state | planned | peak | planned | process |"
    yield "|---|---|---|---|---|---|---|"
    for cell in cells:
        row = found.get(cell)
        if row is None:
            continue
        what = f"| {cell.model} | `{cell.optimizer}`{', chunked loss' * (cell.loss == 'chunked')} |"
        if row["result"] != "measured":
            yield f"{what} {row['result']} ({row['reason']}) | | | | |"
            continue
        same = "the same" if row["state_bytes"] == row["planned_state_bytes"] else f"{row['planned_state_bytes']:,} B"
        peak, planned = row["peak_bytes"], row["planned_peak_bytes"]
        numbers = f"{row['state_bytes'] / 1e6:.3f} MB | {same} | {peak / 1e6:.1f} MB | {planned / peak - 1:+.1%}"
        yield f"{what} {numbers} | {row['process_bytes'] / 1e6:.0f} MB |"


def save_plots(cells: list[Cell], bars: Path | None, curves: Path | None) -> None:
    """Draw the peaks by kind as bars, and where in a step they are as stacked areas."""
    from matplotlib.figure import Figure

    found = [row for cell in cells if (row := done().get(cell)) and row["result"] == "measured"]
    if bars is not None:
        models = list(dict.fromkeys(row["model"] for row in found))
        height = 0.28 * len(found) / len(models) + 1.3
        figure = Figure(figsize=(5.2 * len(models), height), layout="constrained")
        for axis, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
            for row in reversed([row for row in found if row["model"] == model]):
                left = 0.0
                for kind in KINDS:
                    size = row["at_peak"][kind] / 1e6
                    axis.barh(row["optimizer"], size, left=left, color=COLORS[kind], height=0.7)
                    left += size
                axis.plot([row["planned_peak_bytes"] / 1e6] * 2, [row["optimizer"]] * 2, "|", color="black", ms=11)
            axis.set_title(f"{model}: at the peak of a step, and as planned (|)", fontsize=9)
            axis.set_xlabel("MB")
            _tidy(axis)
        figure.legend(handles=_legend(), fontsize=7, ncols=5, frameon=False, loc="outside lower center")
        figure.savefig(bars, dpi=150)
    if curves is not None:
        shown = found[:12]
        down = -(-len(shown) // 3)
        figure = Figure(figsize=(12, 2.2 * down + 0.6), layout="constrained")
        axes = figure.subplots(down, 3, squeeze=False, sharey=True).flat
        for axis, row in zip(axes, shown, strict=False):
            _draw_curve(axis, row)
        for axis in list(axes)[len(shown) :]:
            axis.set_visible(False)
        figure.legend(handles=_legend(), fontsize=8, ncols=5, frameon=False, loc="outside lower center")
        figure.savefig(curves, dpi=150)


def _draw_curve(axis: Any, row: dict[str, Any]) -> None:
    curve = [[size / 1e6 for size in moment] for moment in row["curve"]]
    at = [point / max(1, len(curve) - 1) for point in range(len(curve))]
    axis.stackplot(at, *zip(*curve, strict=True), colors=COLORS.values(), linewidth=0)
    totals = [sum(moment) for moment in curve]
    highest = max(range(len(totals)), key=totals.__getitem__)
    axis.plot(at[highest], totals[highest], "k^", ms=4)
    for name, share in {"forward": 0.0, **row["phases"]}.items():
        axis.axvline(share, color="0.4", linewidth=0.6)
        axis.annotate(f" {name}", (share, 0), fontsize=6, rotation=90, va="bottom")
    axis.set_title(f"{row['optimizer']}: {totals[highest]:.0f} MB", fontsize=8)
    axis.set_xticks([])
    axis.set_ylabel("MB", fontsize=7)
    _tidy(axis)


def _tidy(axis: Any) -> None:
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _legend() -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(color=color, label=kind) for kind, color in COLORS.items()]


def main() -> None:
    """Measure, or show what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="small")
    parser.add_argument("--model", help=f"instead of a suite's: {', '.join([*MODELS, *BUILT_IN])}")
    parser.add_argument("--optimizer", action="append", help="instead of a suite's, as benchmarks/peers.py names them")
    parser.add_argument("--limit", default="", help='memory of a cell, as "2GB"; what needs more is a row that says so')
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--table", action="store_true", help="print planned and measured from the rows")
    parser.add_argument("--plot", type=Path, help="draw the peaks from the rows")
    parser.add_argument("--plot-step", type=Path, help="draw the steps from the rows")
    parser.add_argument("--plan", metavar="MODEL", help="store and print the plan of a model, checkpointed")
    parser.add_argument("--loss", choices=("plain", "chunked"), default="plain", help="of --plan")
    parser.add_argument("--snapshot", type=Path, help="on a GPU: the allocator's history, for pytorch.org/memory_viz")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell:
        print(json.dumps(measure(Cell(**json.loads(given.cell)), given.snapshot)))
        return
    if given.plan:
        store_plan(given.plan, given.plot, given.optimizer, given.loss)
        return
    cells = _chosen(given)
    if given.table or given.plot or given.plot_step:
        if given.table:
            print("\n".join(table(cells)))
        save_plots(cells, given.plot, given.plot_step)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run(cells, given.snapshot)


def store_plan(model: str, picture: Path | None, optimizers: list[str] | None, loss: str) -> None:
    """Plan a step of a large model, print the plan, and store a row for every optimizer."""
    memory = None if optimizers else "24GB"
    found = plan(model, gpu_memory=memory, gradient_checkpointing=True, loss=loss, optimizers=optimizers)
    print(found.table())
    fixed = {"model": model, "parameters": found.parameters, "batch_size": 1, "sequence_length": 2048, "loss": loss}
    for row in found.rows:
        at_peak = None if row.at_peak is None else row.at_peak._asdict()
        sizes = {"state_bytes": row.state, "peak_bytes": row.peak, "at_peak": at_peak, "fits_24GB": row.fits}
        add_row("plan", {**fixed, "optimizer": row.spec, "label": row.optimizer, **sizes})
    if picture is not None:
        found.save_plot(picture)


def _chosen(given: argparse.Namespace) -> list[Cell]:
    changes = {name: getattr(given, name) for name in ("model", "device", "limit") if getattr(given, name)}
    cells = [Cell(**{**asdict(cell), **changes}) for cell in SUITES[given.suite]]
    if given.optimizer:
        cells = [Cell(**{**asdict(cells[0]), "optimizer": spec}) for spec in given.optimizer]
    return list(dict.fromkeys(cells))


if __name__ == "__main__":
    harness.said(main)

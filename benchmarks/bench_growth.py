"""How does the cost of a step grow? With entries, sketch size, sparsity, number of tensors, and ranks.

    python benchmarks/bench_growth.py
    python benchmarks/bench_growth.py --plot docs/speed-growth.png      # measure nothing, draw the last rows

Each sweep changes one thing and times SGC in turns with fused AdamW, as far as memory allows. Ranks are processes of
one machine that sum compressed gradients through gloo, in a process group of their own ("ranks" has no AdamW).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from benchmarks import harness, peers

NAME = "growth"
SKETCHED = "sgc(sketch_size=32)"
PEERS = ("adamw_fused", "sgc", SKETCHED)
MIB = 1 << 20


def matrices(entries: int, number: int, device: torch.device, dtype: torch.dtype) -> list[nn.Parameter]:
    """Make `number` matrices with gradients, `entries` entries in total, rows of at most 4096."""
    each = max(1, entries // number)
    cols = min(4096, 1 << (math.isqrt(each).bit_length() - 1))
    shape = (max(1, each // cols), cols)
    params = [nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)) for _ in range(number)]
    for param in params:
        param.grad = torch.randn(shape, device=device, dtype=dtype)
    return params


def sweeps(device: torch.device, smoke: bool) -> dict[str, list[tuple[int, int, tuple[str, ...]]]]:
    """List the points of every sweep: entries, tensors, optimizers."""
    largest = (1 << 30) if device.type == "cuda" else (1 << 27)
    middle = (1 << 28) if device.type == "cuda" else (1 << 23)
    if smoke:
        largest, middle = 1 << 19, 1 << 17
    entries = [1 << e for e in range(17 if smoke else 20, largest.bit_length(), 1)]
    return {
        "entries": [(d, 1, PEERS) for d in entries],
        "sketch_size": [(middle, 1, (f"sgc(sketch_size={k}, sparsity=4)",)) for k in (8, 16, 32, 64, 128)],
        "sparsity": [(middle, 1, (f"sgc(sketch_size=128, sparsity={s})",)) for s in (1, 2, 4, 8, 16)],
        "tensors": [(middle, number, PEERS) for number in (1, 4, 16, 64, 256, 1024)],
    }


def measure(point: tuple[int, int, tuple[str, ...]], device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Time one point; a point that does not fit in memory is reported as such."""
    entries, number, specs = point
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = []
    try:
        params = matrices(entries, number, device, dtype)
        calls: dict[str, Callable[[], Any]] = {spec: peers.make(spec, params, 1e-6).optimizer.step for spec in specs}
        found = harness.interleave(calls, device, repeats=15, seconds=seconds, warm_up=2)
    except torch.OutOfMemoryError as error:
        return [{"entries": entries, "tensors": number, "failed": str(error)[:200]}]
    for spec, ms in found.items():
        held = sum(param.numel() for param in params)
        rows.append({"entries": held, "tensors": number, "optimizer": spec, "dtype": str(dtype)[6:], "ms": ms})
    return rows


def ranks_of(smoke: bool) -> list[dict[str, Any]]:
    """Time attached steps with 1 and 2 processes that sum compressed gradients, in processes of their own."""
    rows = []
    for number in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--rank-of", str(number), "--store", f"{folder}/store"]
            started = [
                subprocess.Popen(
                    [*command, "--rank", str(rank), *(["--smoke"] if smoke else [])], stdout=subprocess.PIPE
                )
                for rank in range(number)
            ]
            outputs = [process.communicate()[0] for process in started]
            if any(process.returncode for process in started):
                raise RuntimeError(f"{number} ranks ended with {[process.returncode for process in started]}")
            rows += [{"ranks": number, **row} for row in json.loads(outputs[0])]
    return rows


def run_rank(arguments: argparse.Namespace) -> None:
    """Run one rank; rank 0 prints the rows as JSON."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{arguments.store}", rank=arguments.rank, world_size=arguments.rank_of
    )
    side = 64 if arguments.smoke else 1024
    rows = []
    for spec in ("adamw_fused", "attached", "attached(sketch_size=32)"):
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(*[nn.Linear(side, side, bias=False) for _ in range(4)], nn.LayerNorm(side))
        made = peers.make(spec, model, 1e-6)
        wrapped = nn.parallel.DistributedDataParallel(model) if arguments.rank_of > 1 else model
        x = torch.randn(16, side)
        passed: list[float] = []
        for _ in range(4 if arguments.smoke else 25):
            torch.distributed.barrier()
            start = time.perf_counter()
            wrapped(x).square().mean().backward()
            made.optimizer.step()
            made.optimizer.zero_grad()
            passed.append(time.perf_counter() - start)
        ms = harness.quantiles(passed[2:]) | {"rounds": len(passed) - 2}
        rows.append({"optimizer": spec, "entries": 4 * side * side, "tensors": 4, "ms": ms})
    if arguments.rank == 0:
        print(json.dumps(rows))
    torch.distributed.destroy_process_group()


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--sweep", action="append", choices=("entries", "sketch_size", "sparsity", "tensors", "ranks"))
    parser.add_argument("--seconds", type=float, default=8.0, help="for the rounds of one point")
    parser.add_argument("--smoke", action="store_true", help="small tensors, no rows")
    parser.add_argument("--plot", type=Path, help="measure nothing, draw the last rows")
    parser.add_argument("--rank-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        run_rank(arguments)
        return
    if arguments.plot:
        plot(arguments.plot)
        return
    device = harness.device_of(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    wanted = arguments.sweep or ["entries", "sketch_size", "sparsity", "tensors", "ranks"]
    for sweep, points in {**sweeps(device, arguments.smoke), "ranks": []}.items():
        if sweep not in wanted:
            continue
        found: list[dict[str, Any]] = []
        if sweep == "ranks":
            found = ranks_of(arguments.smoke)
        for point in points:
            found += measure(point, device, 0.5 if arguments.smoke else arguments.seconds)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        for row in found:
            row = {"sweep": sweep, "device": "cpu" if sweep == "ranks" else device.type, **row}
            print(row, flush=True)
            if not arguments.smoke:
                harness.add_row(NAME, {**row, "load_average": os.getloadavg()[0]})


def plot(output: Path) -> None:
    """Draw time against what grows, log-log, a panel per sweep."""
    kept = [row for row in harness.rows(NAME) if "ms" in row]
    device = "cuda" if any(row["device"] == "cuda" for row in kept) else "cpu"
    rows = [row for row in kept if row["device"] == device and row["sweep"] != "ranks"]
    names = [
        name for name in ("entries", "tensors", "sketch_size", "sparsity") if any(r["sweep"] == name for r in rows)
    ]
    figure, axes = harness.panels(len(names), columns=2)
    for axis, name in zip(axes, names, strict=True):
        lines: dict[str, dict[float, float]] = {}
        for row in rows:
            if row["sweep"] != name:
                continue
            kwargs = peers.parse(row["optimizer"])[1]
            x = row[name] if name in row else kwargs[name]
            line = row["optimizer"] if name in row else "sgc"
            lines.setdefault(line, {})[x] = row["ms"].get("cpu_p50", row["ms"]["p50"])
        for line, points in lines.items():
            color = {"adamw_fused": "#c1440e", "sgc": "#0b6e4f"}.get(line, "#d9a441")
            axis.plot(*zip(*sorted(points.items()), strict=True), "o-", label=line, color=color, markersize=3)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(
            {"entries": "entries of one tensor", "tensors": "tensors of the same entries together"}.get(name, name)
        )
        axis.legend(fontsize=7)
    axes[0].set_ylabel("ms per step")
    harness.save_figure(figure, output)


if __name__ == "__main__":
    main()

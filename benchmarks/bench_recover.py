"""Which recovery earns its place? Cosine to perfect recovery against time, over n, k and s; and how near to its floor?

    python benchmarks/bench_recover.py
    python benchmarks/bench_recover.py --plot docs/speed-recover.png    # measure nothing, draw the last rows

The input is what the optimizer recovers: a momentum of sparse chunks, 0.9 of the last plus the new top entries of a
Gaussian whose scale is log-normal over the coordinates, after 30 steps. "Perfect" is its own s' largest entries.
"threshold", the default, runs on each path there is (torch, and numba or Triton). Its floor is reading the sketches and
writing index and value over the bandwidth of a copy, or one pass over A at the rate of a matrix product, whichever is
more, both measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import harness
from benchmarks.bench_sparsify import on, paths
from sgc.codec.layout import make_layout
from sgc.codec.project import Projection
from sgc.codec.recover import METHODS, recover
from sgc.codec.sparsify import top_entries

NAME = "recover"
SIZES = ((256, 8, 1), (256, 32, 4), (256, 64, 4), (256, 64, 8), (1024, 32, 4), (1024, 128, 16))
CHUNKS = {"cpu": 4096, "cuda": 1 << 18}
DRAWN = 2048  # distinct chunks


def momentum(n: int, s: int, generator: torch.Generator) -> torch.Tensor:
    """Draw (DRAWN, n): what 30 steps of sparse gradients leave at β1 = 0.9."""
    scale = torch.randn(DRAWN, n, generator=generator).mul(0.7).exp()
    mean = torch.randn(DRAWN, n, generator=generator) * 0.5
    moment = torch.zeros(DRAWN, n)
    for _ in range(30):
        gradient = (mean + torch.randn(DRAWN, n, generator=generator)) * scale
        index, value = top_entries(gradient, s)
        moment.mul_(0.9).scatter_add_(1, index, value)
    return moment


def cosine(found: tuple[torch.Tensor, torch.Tensor], dense: torch.Tensor, s: int) -> float:
    """Compare what was recovered with the s largest entries of what was sketched."""
    index, value = top_entries(dense, s)
    perfect = torch.zeros_like(dense).scatter_(1, index, value)
    there = torch.zeros_like(dense).scatter_(1, found[0][: len(dense)].cpu(), found[1][: len(dense)].cpu())
    return torch.nn.functional.cosine_similarity(there, perfect, dim=1).mean().item()


def main() -> None:
    """Measure every method on every size, the methods interleaved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the rounds of one size")
    parser.add_argument("--smoke", action="store_true", help="few chunks, no rows")
    parser.add_argument("--plot", type=Path, help="measure nothing, draw the last rows")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(arguments.plot)
        return
    device = harness.device_of(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    chunks, seconds = (256, 1.0) if arguments.smoke else (CHUNKS[device.type], arguments.seconds)
    rates = harness.floors(device, torch.float32)
    for n, k, s in SIZES[:2] if arguments.smoke else SIZES:
        dense = momentum(n, s, torch.Generator().manual_seed(0))[:chunks]
        projection = Projection(k, seed=0)
        everything = torch.arange(n).expand(len(dense), n)
        sketch = projection.project(everything, dense, n).to(device).repeat(max(1, chunks // len(dense)), 1)
        layout = make_layout((len(sketch), n), n, within_rows=True)
        calls: dict[str, Callable[[], Any]] = {}
        cosines = {}
        for method in METHODS:
            for path in paths(device) if method == "threshold" else ["torch"]:
                call = functools.partial(recover, sketch, layout, projection, s, method)
                calls[f"{method} {path}"] = on(path, call)
                with harness.environment(SGC_KERNELS=path):
                    cosines[f"{method} {path}"] = cosine(call(), dense, s)
        found = harness.interleave(calls, device, repeats=11, seconds=seconds, warm_up=1)
        moved, operations = len(sketch) * (k * 4 + s * 12), 2 * len(sketch) * n * k
        floor = 1e3 * max(moved / rates["copy_bytes_per_s"], operations / rates["matrix_flops_per_s"])
        clock = "cpu_p50" if device.type == "cpu" else "p50"
        for key, ms in found.items():
            method, path = key.split()
            row = {"n": n, "k": k, "s": s, "method": method, "path": path, "cosine": round(cosines[key], 4)}
            row |= {"chunks": len(sketch), "device": device.type, "ms": ms, "floor_ms": round(floor, 4)}
            row |= {"of_floor": round(floor / ms[clock], 4)}
            row |= {"time_over_threshold": round(ms[clock] / found["threshold torch"][clock], 3)}
            print(row, flush=True)
            if not arguments.smoke:
                rounded = {name: round(rate) for name, rate in rates.items()}
                harness.add_row(NAME, {**row, **rounded, "load_average": os.getloadavg()[0]})


def plot(output: Path) -> None:
    """Draw cosine against time per chunk, a panel per size."""
    last = {}
    for row in harness.rows(NAME):
        if "path" in row:
            last[row["device"], row["n"], row["k"], row["s"], row["method"], row["path"]] = row
    devices = {key[0] for key in last}
    device = "cuda" if "cuda" in devices else "cpu"
    figure, axes = harness.panels(len(SIZES), columns=3)
    colors = {"omp": "#c1440e", "gomp": "#d9a441", "threshold": "#0b6e4f"}
    for axis, (n, k, s) in zip(axes, SIZES, strict=True):
        for (where, *size, method, path), row in last.items():
            if where == device and tuple(size) == (n, k, s):
                time = row["ms"]["cpu_p50" if device == "cpu" else "p50"] / row["chunks"] * 1e6
                axis.plot(time, row["cosine"], "o", color=colors[method])
                axis.annotate(
                    f"{method}, {path}", (time, row["cosine"]), fontsize=7, xytext=(4, 4), textcoords="offset points"
                )
        axis.set_xscale("log")
        axis.margins(x=0.3, y=0.25)
        axis.set_title(f"n={n}, k={k}, s'={s}", fontsize=9)
    for axis in axes[-3:]:
        axis.set_xlabel("ns per chunk")
    for axis in axes[::3]:
        axis.set_ylabel("cosine to perfect recovery")
    harness.save_figure(figure, output)


if __name__ == "__main__":
    main()

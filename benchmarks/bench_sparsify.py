"""How near is the selection to its floor? Sums of squares, and whitening with exact top-s, over n and s.

    python benchmarks/bench_sparsify.py

Each stage on each path there is (torch, and numba or Triton), in turns with torch.topk alone. The floor of a stage is
what it must read and write over the bandwidth of a copy, measured in the same run; "of_floor" is floor ÷ time.
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
from sgc.codec.encode import Whitening, select
from sgc.codec.layout import Layout, make_layout
from sgc.constants import CLIP
from sgc.whiten import square_sums

NAME = "sparsify"
SIZES = ((256, 1), (256, 4), (256, 8), (1024, 4), (1024, 16), (4096, 16))
ENTRIES = {"cpu": 1 << 23, "cuda": 1 << 28}


def problem(entries: int, n: int, device: torch.device) -> tuple[torch.Tensor, Layout, Whitening]:
    """Draw a gradient (rows, 4096), bf16 on a GPU, and what whitens it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    grid = torch.randn(entries // 4096, 4096, generator=generator, device=device).to(dtype)
    layout = make_layout(grid.shape, n)
    row, col = square_sums(grid, layout)
    return grid, layout, Whitening((row / row.mean()).sqrt(), (col / len(grid)).sqrt(), None, 1e-8, CLIP)


def on(path: str, call: Callable[[], Any]) -> Callable[[], None]:
    """Return a function that makes a call on one path."""

    def run() -> None:
        with harness.environment(SGC_KERNELS=path):
            call()

    return run


def paths(device: torch.device) -> list[str]:
    """List the paths there are."""
    return ["torch", *([fast] if (fast := harness.fast_path(device)) else [])]


def record(
    name: str, found: dict[str, dict[str, float]], floor: dict[str, float], shared: dict[str, Any], write: bool
) -> None:
    """Print and write a row for each call; keys are "stage path"."""
    for key, ms in found.items():
        stage, _, path = key.partition(" ")
        row = {**shared, "stage": stage, "path": path, "ms": ms}
        if stage in floor:
            clock = ms.get("cpu_p50", ms["p50"])
            row |= {"floor_ms": round(floor[stage] * 1e3, 4), "of_floor": round(floor[stage] * 1e3 / clock, 4)}
        print({k: v for k, v in row.items() if k != "device"}, flush=True)
        if write:
            harness.add_row(name, {**row, "load_average": os.getloadavg()[0]})


def setting(question: str) -> tuple[argparse.Namespace, torch.device, int, torch.dtype]:
    """Read the command line: `smoke` and `seconds`, the device, and how many entries of which dtype are timed there."""
    parser = argparse.ArgumentParser(description=question, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--seconds", type=float, default=20.0, help="for the rounds of one size")
    parser.add_argument("--smoke", action="store_true", help="small tensors, no rows")
    arguments = parser.parse_args()
    device = harness.device_of(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    if arguments.smoke:
        arguments.seconds = 1.0
    entries = 1 << 18 if arguments.smoke else ENTRIES[device.type]
    return arguments, device, entries, torch.bfloat16 if device.type == "cuda" else torch.float32


def main() -> None:
    """Measure."""
    arguments, device, entries, dtype = setting(__doc__)
    rate = harness.floors(device, dtype)["copy_bytes_per_s"]
    for number, (n, s) in enumerate(SIZES[:2] if arguments.smoke else SIZES):
        grid, layout, whitening = problem(entries, n, device)
        calls: dict[str, Callable[[], Any]] = {}
        chunks = grid.view(-1, n)
        calls["topk torch"] = functools.partial(chunks.topk, s, dim=1, sorted=False)
        for path in paths(device):
            if number == 0:
                calls[f"statistics {path}"] = on(path, functools.partial(square_sums, grid, layout))
            calls[f"select {path}"] = on(path, functools.partial(select, grid, layout, whitening, s))
        found = harness.interleave(calls, device, repeats=15, seconds=arguments.seconds)
        read = grid.nbytes / rate
        floor = {"statistics": read, "select": read + layout.chunks * s * 12 / rate, "topk": read}
        shared = {"n": n, "s": s, "entries": grid.numel(), "device": device.type, "dtype": str(dtype)[6:]}
        record(NAME, found, floor, {**shared, "copy_bytes_per_s": round(rate)}, not arguments.smoke)


if __name__ == "__main__":
    main()

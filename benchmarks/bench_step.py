"""What does one optimizer step cost? SGC against other optimizers, in turns, in one run.

    python benchmarks/bench_step.py                            # on a CPU: four 1024² and one 2048×5504, fp32
    python benchmarks/bench_step.py --load llama-2-7b          # on a GPU, where it is among the defaults
    python benchmarks/bench_step.py --table                    # the last run of each load, from the rows

Weights and gradients are random and shared by all optimizers; each holds its own state. SGC runs on each path there is
(torch, and numba or Triton). "first" is the first step: what is made once, a compiled kernel or GaLore's decomposition,
is in it; GaLore decomposes again every 200 steps, and "amortised" adds a 200th of that. "attached" is fed the same
gradients through its hooks, so its time has the encoding in it and a copy of each gradient.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from benchmarks import harness, peers

NAME = "step"
LOOP, FUSED = "adamw(foreach=False)", "adamw_fused"
OPTIMIZERS = (
    LOOP,
    "adamw_foreach",
    FUSED,
    "sgd",
    "sgd_momentum",
    "adafactor",
    "apollo_mini",
    "apollo(rank=128)",
    "galore(rank=128)",
    "adamw8bit",
    "torchao8bit",
)
SGC = (
    "sgc",
    "sgc(sparsity=4)",
    "sgc(sketch_size=8)",
    "sgc(sketch_size=32)",
    "sgc(sketch_size=128, chunk_size=1024, sparsity=16)",
    "attached",
    "attached(sketch_size=32)",
)
SLOW_TO_START = ("torchao8bit",)  # compiles for minutes on a CPU
REFRESHED = {"galore": 200, "apollo": 200}  # steps from one first step to the next


def _llama(hidden: int, inner: int, key: int, layers: int) -> list[tuple[int, ...]]:
    attention = [(hidden, hidden), (key, hidden), (key, hidden), (hidden, hidden)]
    return [*attention, (inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)] * layers


LOADS: dict[str, list[tuple[int, ...]]] = {
    "matrices": [(1024, 1024)] * 4 + [(2048, 5504)],
    "llama-3.2-1b": _llama(2048, 8192, 512, 4),  # 4 of 16 layers
    "llama-2-7b": _llama(4096, 11008, 4096, 2),  # 2 of 32 layers
    "smoke": [(64, 96), (96,), (128, 256)],
}


class Bare(nn.Module):
    """Parameters without a model around them."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(params)


def draw(shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> list[nn.Parameter]:
    """Draw weights, and gradients of the size that fine-tuning has."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        params.append(nn.Parameter((torch.randn(shape, generator=generator, device=device) * 0.02).to(dtype)))
        scale = torch.randn(shape[-1], generator=generator, device=device).mul(0.7).exp() * 1e-3
        params[-1].grad = (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)
    return params


def stepping(spec: str, params: list[nn.Parameter], path: str) -> tuple[Callable[[], None], Callable[[], int]]:
    """Make an optimizer; return a function that makes one step and one that counts the bytes of its state."""
    if not spec.startswith("attached"):
        optimizer = peers.make(spec, params, 1e-5).optimizer

        def step() -> None:
            with harness.environment(SGC_KERNELS=path):
                optimizer.step()

        return step, lambda: peers.state_bytes(optimizer)
    own = [nn.Parameter(param.detach()) for param in params]
    attached = peers.make(spec, Bare(own), 1e-5).optimizer
    gradients = [param.grad for param in params]

    def hooked_step() -> None:
        with harness.environment(SGC_KERNELS=path):
            torch.autograd.backward([param.view_as(param) for param in own], gradients)
            attached.step()
            attached.zero_grad()

    return hooked_step, lambda: peers.state_bytes(attached)


def measure(load: str, device: torch.device, specs: list[str], repeats: int, seconds: float) -> list[dict[str, Any]]:
    """Time one step of every optimizer on a load."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    params = draw(LOADS[load], device, dtype)
    fast = harness.fast_path(device)
    calls: dict[str, Callable[[], None]] = {}
    rows: dict[str, dict[str, Any]] = {}
    counts: dict[str, Callable[[], int]] = {}
    for spec in specs:
        ours = spec.startswith(("sgc", "attached"))
        if not ours and (reason := peers.why_not(peers.parse(spec)[0])) is not None:
            rows[spec] = {"optimizer": spec, "not_installed": reason}
            continue
        for path in ("torch", *([fast] if fast else [])) if ours else ("",):
            name = f"{spec} {path}".strip()
            rows[name] = {"optimizer": spec, **({"path": path} if ours else {})}
            try:
                calls[name], counts[name] = stepping(spec, params, path or "auto")
                harness.synchronize(device)
                start = time.perf_counter()
                calls[name]()
                harness.synchronize(device)
            except Exception as error:  # a peer's failure is its result, and no reason to lose the others
                if ours:
                    raise
                rows[name]["failed"] = f"{type(error).__name__}: {error}"[:300]
                calls.pop(name, None)
                continue
            rows[name]["first_ms"] = round((time.perf_counter() - start) * 1e3, 3)
    found = harness.interleave(calls, device, repeats=repeats, seconds=seconds)
    entries = sum(param.numel() for param in params)
    clock = "cpu_p50" if device.type == "cpu" else "p50"
    for name, ms in found.items():
        row = rows[name]
        row |= {"ms": ms, "state_bytes": counts[name]()}
        row["state_ratio"] = round(row["state_bytes"] / (8 * entries), 6)
        for other, key in ((LOOP, "over_adamw_loop"), (FUSED, "over_adamw_fused")):
            if other in found:
                row[key] = round(ms["p50"] / found[other]["p50"], 3)
                if clock != "p50":
                    row[key + "_cpu"] = round(ms[clock] / found[other][clock], 3)
        gap = REFRESHED.get(peers.parse(row["optimizer"])[0])
        if gap is not None:
            row["amortised_ms"] = round(ms["p50"] + max(0.0, row["first_ms"] - ms["p50"]) / gap, 3)
            if LOOP in found:
                row["amortised_over_adamw_loop"] = round(row["amortised_ms"] / found[LOOP]["p50"], 3)
        largest, peak = harness.temporaries(calls[name], device)
        row |= {"largest_temporary": largest, "peak_temporary": peak}
    shared = {"load": load, "entries": entries, "tensors": len(params), "device": device.type, "dtype": str(dtype)[6:]}
    return [{**shared, **row, "load_average": os.getloadavg()[0]} for row in rows.values()]


def show(rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    columns = ("p50 ms", "× loop", "× fused", "first ms", "state MB", "peak MB")
    print(f"{'optimizer':52} {'path':7} " + " ".join(f"{column:>9}" for column in columns))
    for row in rows:
        if "ms" not in row:
            print(f"{row['optimizer']:52} {row.get('not_installed') or row['failed']}")
            continue
        cpu = row["device"] == "cpu"
        loop, fused = (row.get(f"over_adamw_{kind}" + "_cpu" * cpu, float("nan")) for kind in ("loop", "fused"))
        print(
            f"{row['optimizer']:52} {row.get('path', ''):7} {row['ms']['cpu_p50' if cpu else 'p50']:9.2f} {loop:9.2f} "
            f"{fused:9.2f} {row['first_ms']:9.0f} {row['state_bytes'] / 1e6:9.2f} {row['peak_temporary'] / 1e6:9.2f}"
        )


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", choices=LOADS, action="append")
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--optimizer", action="append", help="a spec as of benchmarks/peers.py; default: all")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60.0, help="for the rounds of one load")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--slow", action="store_true", help="also optimizers that compile for minutes")
    parser.add_argument("--smoke", action="store_true", help="tiny tensors, no rows")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the last rows")
    arguments = parser.parse_args()
    device = harness.device_of(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    loads = arguments.load or (["matrices"] if device.type == "cpu" else ["matrices", "llama-3.2-1b", "llama-2-7b"])
    loads = ["smoke"] if arguments.smoke else loads
    specs = arguments.optimizer or [*OPTIMIZERS, *SGC]
    if not arguments.slow and not arguments.optimizer:
        specs = [spec for spec in specs if spec not in SLOW_TO_START]
    for load in loads:
        if arguments.table:
            last: dict[tuple[str, str], dict[str, Any]] = {}
            for row in harness.rows(NAME):
                if row["load"] == load and row["device"] == device.type:
                    last[row["optimizer"], row.get("path", "")] = row
            print(f"\n{load}, {device}")
            show(list(last.values()))
            continue
        repeats, seconds = (3, 5.0) if arguments.smoke else (arguments.repeats, arguments.seconds)
        found = measure(load, device, specs, repeats, seconds)
        print(f"\n{load}, {device}")
        show(found)
        for row in found if not arguments.smoke else ():
            harness.add_row(NAME, row)


if __name__ == "__main__":
    main()

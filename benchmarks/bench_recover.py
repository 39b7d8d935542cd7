"""Which recovery earns its place? Cosine to perfect recovery against time, over n, k and s.

    python benchmarks/bench_recover.py

The input is what the optimizer recovers: a momentum of sparse chunks, 0.9 of the last plus the new top entries of a
Gaussian whose scale is log-normal over the coordinates, after 30 steps. "Perfect" is its own s' largest entries.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import add_row
from sgc.codec.project import Projection
from sgc.codec.recover import METHODS, recover
from sgc.codec.sparsify import top_entries

CHUNKS = 2048
REPEATS = 5


def momentum(n: int, s: int, generator: torch.Generator) -> torch.Tensor:
    """Draw (CHUNKS, n): what 30 steps of sparse gradients leave at β1 = 0.9."""
    scale = torch.randn(CHUNKS, n, generator=generator).mul(0.7).exp()
    mean = torch.randn(CHUNKS, n, generator=generator) * 0.5
    moment = torch.zeros(CHUNKS, n)
    for _ in range(30):
        gradient = (mean + torch.randn(CHUNKS, n, generator=generator)) * scale
        index, value = top_entries(gradient, s)
        moment.mul_(0.9).scatter_add_(1, index, value)
    return moment


def main() -> None:
    """Measure every method on every size, the methods interleaved."""
    torch.set_num_threads(1)
    print(f"{'n':>5} {'k':>4} {'s':>3}  " + "  ".join(f"{method:>20}" for method in METHODS))
    for n, k, s in [(256, 8, 1), (256, 32, 4), (256, 64, 4), (256, 64, 8), (1024, 32, 4), (1024, 128, 16)]:
        dense = momentum(n, s, torch.Generator().manual_seed(0))
        projection = Projection(k, seed=0)
        everything = torch.arange(n).expand(CHUNKS, n)
        sketch = projection.project(everything, dense, n)
        index, value = top_entries(dense, s)
        perfect = torch.zeros_like(dense).scatter_(1, index, value)
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        cosine = {}
        for _ in range(REPEATS):
            for method in METHODS:
                start = time.perf_counter()
                index, value = recover(sketch, n, projection, s, method)
                seconds[method].append(time.perf_counter() - start)
                found = torch.zeros_like(dense).scatter_(1, index, value)
                cosine[method] = torch.nn.functional.cosine_similarity(found, perfect, dim=1).mean().item()
        threshold = median(seconds["threshold"])
        for method in METHODS:
            row = {"n": n, "k": k, "s": s, "method": method, "cosine": round(cosine[method], 4), "chunks": CHUNKS}
            add_row("recover", {**row, "time_over_threshold": round(median(seconds[method]) / threshold, 2)})
        cells = (f"{cosine[m]:.3f} at {median(seconds[m]) / threshold:5.1f} ×" for m in METHODS)
        print(f"{n:>5} {k:>4} {s:>3}  " + "  ".join(f"{cell:>20}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()

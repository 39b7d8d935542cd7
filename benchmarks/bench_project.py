"""How near is the projection to its floor? A·x of sparse chunks alone, and the whole encoding, over n, k and s.

    python benchmarks/bench_project.py

"project" is y = A[:, index]·value; "encode" whitens, selects and projects a gradient. Each on each path there is, in
turns with the plain way: gather the columns, multiply, sum. Floors are bytes over the bandwidth of a copy and
operations over the rate of a matrix product, whichever is more, both measured in the same run.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import harness
from benchmarks.bench_sparsify import on, paths, problem, record, setting
from sgc.codec.encode import encode, select
from sgc.codec.project import Projection

NAME = "project"
SIZES = ((256, 8, 1), (256, 32, 4), (256, 64, 8), (1024, 32, 4), (1024, 128, 16))


def main() -> None:
    """Measure."""
    arguments, device, entries, dtype = setting(__doc__)
    rates = harness.floors(device, dtype)
    for n, k, s in SIZES[:2] if arguments.smoke else SIZES:
        grid, layout, whitening = problem(entries, n, device)
        projection = Projection(k, 0)
        index, value = select(grid, layout, whitening, s)
        columns = projection.columns(n, device)
        calls: dict[str, Callable[[], Any]] = {}
        calls["gather torch"] = functools.partial(_gather, columns, index, value)
        for path in paths(device):
            if path != "triton":  # there it has no kernel of its own
                calls[f"project {path}"] = on(path, functools.partial(projection.project, index, value, n))
            calls[f"encode {path}"] = on(path, functools.partial(encode, grid, layout, projection, s, whitening))
        found = harness.interleave(calls, device, repeats=15, seconds=arguments.seconds)
        sketch = layout.chunks * k
        operations = 2 * sketch * s / rates["matrix_flops_per_s"]
        project = max((layout.chunks * s * 12 + sketch * 4) / rates["copy_bytes_per_s"], operations)
        whole = max((grid.nbytes + sketch * 4) / rates["copy_bytes_per_s"], operations)
        floor = {"project": project, "gather": project, "encode": whole}
        shared = {"n": n, "k": k, "s": s, "entries": grid.numel(), "device": device.type, "dtype": str(dtype)[6:]}
        record(NAME, found, floor, {**shared, **{key: round(x) for key, x in rates.items()}}, not arguments.smoke)


def _gather(columns: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Project block by block in the plain way."""
    step = max(1, (1 << 22) // (index.shape[1] * columns.shape[1]))
    parts = zip(index.split(step), value.split(step), strict=True)
    return torch.cat([torch.einsum("csk,cs->ck", columns[at], x) for at, x in parts])


if __name__ == "__main__":
    main()

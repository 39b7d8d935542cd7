"""The stages compiled for a CPU, where numba is installed: tensors in, tensors out, on every thread.

`SGC_KERNELS` in the environment decides: "auto", the default, takes numba where it is, "torch" never, "numba" insists.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgc import backends
from sgc.constants import RIDGE

if TYPE_CHECKING:
    from sgc.codec.encode import Whitening
    from sgc.codec.layout import Layout
    from sgc.codec.project import Projection

PART_ENTRIES = 1 << 18  # rows or chunks of so many entries are one task, whatever the number of threads
BLOCK_ENTRIES = 1 << 20  # correlations that are held at a time
MOST_INSERTED = 128  # beyond so many entries of a chunk, insertion takes longer than torch's partition
_CPU = torch.device("cpu")
_FP32 = torch.float32  # whatever torch's default dtype
_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # a child has none of its parent's threads


def choose() -> backends.Choice:
    """Return whether a CPU takes numba or torch, and why.

    Raises:
        RuntimeError: `SGC_KERNELS` is "numba", and numba is not installed.
    """
    return _choose(backends.requested())


@functools.cache
def _choose(mode: str) -> backends.Choice:
    if mode in ("torch", "triton"):
        return backends.Choice("torch", f"{backends.VARIABLE}={mode}")
    if not _installed():
        if mode == "numba":
            raise RuntimeError(f'{backends.VARIABLE}=numba asks for numba, which is missing: pip install "sgc[numba]"')
        return backends.Choice("torch", 'numba is not installed: pip install "sgc[numba]"')
    try:
        _loops()
    except ImportError as error:  # as where numba is too old for this numpy
        if mode == "numba":
            raise
        return backends.Choice("torch", f"numba can't be imported: {error}")
    return backends.Choice("numba", f"numba {metadata.version('numba')}")


def takes(mode: str) -> bool:
    """Whether numba is to be asked, given what `SGC_KERNELS` asks for."""
    return _choose(mode).path == "numba"


def usable(*tensors: Tensor) -> bool:
    """Whether numba can work on these tensors: all on the CPU, plain and in fp32."""
    return all(
        type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.dtype is torch.float32 for x in tensors
    )


# ---- the stages, by the names and arguments of their twins in torch


def square_sums(grid: Tensor, layout: Layout) -> Any:
    """Compute `sgc.whiten.square_sums`."""
    if not usable(grid):
        return NotImplemented
    rows, cols = grid.shape
    step = max(1, 4 * PART_ENTRIES // max(1, cols))  # as many sums over columns are held
    parts = math.ceil(rows / step)
    row, col = torch.empty(rows, dtype=_FP32, device=_CPU), torch.zeros(parts, cols, dtype=_FP32, device=_CPU)
    loops, array = _loops(), _array(grid)
    row_array, col_array = _array(row), _array(col)

    def sums(first: int, last: int) -> None:
        for part in range(first, last):
            loops.square_sums(array, row_array, col_array[part], part * step, min(part * step + step, rows))

    _share(sums, parts)
    return row, col.sum(0)


def apply_whitened(
    weight: Tensor,
    grid: Tensor,
    layout: Layout,
    whitening: Whitening,
    lr: float,
    decay: float,
    generator: torch.Generator | None,
    offset: int = 0,
) -> Any:
    """Compute `sgc.apply.apply_whitened` for weights that are as many as the entries of the grid."""
    if offset or weight.numel() != grid.numel() or not usable(weight, grid):
        return NotImplemented
    scalars = _floats(whitening.eps, whitening.clip, lr, 1 - decay)
    arrays = (*map(_array, (weight.view_as(grid), grid, whitening.a, whitening.b)), *scalars)
    _share_rows(_loops().apply_whitened, grid.shape, arrays)
    return None


def top(block: Tensor, layout: Layout, whitening: Whitening | None, sparsity: int) -> Any:
    """Compute `sgc.codec.encode.top` for few entries of each chunk."""
    if not (sparsity < layout.chunk and sparsity <= MOST_INSERTED and usable(block)):
        return NotImplemented
    shape = layout.chunk, layout.chunks_per_row, layout.rows_per_chunk
    chunks = math.ceil(block.shape[0] / layout.rows_per_chunk) * layout.chunks_per_row
    index = torch.empty(chunks, sparsity, dtype=torch.int64, device=_CPU)
    value = torch.empty(chunks, sparsity, dtype=_FP32, device=_CPU)
    none = torch.empty(0, dtype=_FP32, device=_CPU)
    a, b, eps, clip = (none, none, 0.0, math.inf) if whitening is None else (*whitening[:2], *whitening[3:])
    arrays = (
        *map(_array, (block, a, b)),
        *_floats(eps, clip),
        *shape,
        groups_of(layout.chunk, sparsity),
        *map(_array, (index, value)),
    )
    _share_rows(_loops().select, (chunks, layout.chunk), arrays)
    return index, value


def project(value: Tensor, index: Tensor, columns: Tensor) -> Any:
    """Compute `sgc.codec.project.project`."""
    if not usable(value):
        return NotImplemented
    out = value.new_zeros(index.shape[0], columns.shape[1])
    arrays = (*map(_array, (index, value, columns, out)), *_floats(1.0))
    _share_rows(_loops().project, (index.shape[0], index.shape[1] * columns.shape[1]), arrays)
    return out


def threshold(sketch: Tensor, n: int, projection: Projection, sparsity: int, lengths: Tensor | None) -> Any:
    """Compute `sgc.codec.recover.threshold` for an A that is held and few entries of each chunk."""
    if not (projection.holds(n) and sparsity <= MOST_INSERTED and usable(sketch)):
        return NotImplemented
    columns, words = projection.columns(n, sketch.device), projection.sign_bits(n)
    index = torch.empty(sketch.shape[0], sparsity, dtype=torch.int64, device=_CPU)
    value = sketch.new_empty(sketch.shape[0], sparsity)
    step = max(1, BLOCK_ENTRIES // n)
    correlation = sketch.new_empty(min(step, sketch.shape[0]), n)
    none = torch.empty(0, dtype=torch.int64, device=_CPU)
    for start in range(0, sketch.shape[0], step):
        part = slice(start, start + step)
        here = torch.mm(sketch[part], columns.T, out=correlation[: sketch.shape[0] - start])
        arrays = (
            *map(_array, (here, words)),
            projection.sketch_size,
            *_floats(RIDGE),
            _array(none if lengths is None else lengths[part]),
            groups_of(n, sparsity),
            *map(_array, (index[part], value[part])),
        )
        _share_rows(_loops().recover, here.shape, arrays)
    return index, value


def groups_of(n: int, sparsity: int) -> int:
    """Return the number of groups that n entries are dealt into to find the s largest: about √(n·s), at least s."""
    width = 1 << (math.isqrt(max(1, n // sparsity)).bit_length() - 1)
    return max(sparsity, math.ceil(n / width))


def _share_rows(function: Callable[..., None], shape: tuple[int, ...] | torch.Size, arrays: tuple[Any, ...]) -> None:
    rows, entries = shape
    step = max(1, PART_ENTRIES // max(1, entries))

    def run(first: int, last: int) -> None:
        function(*arrays, first * step, min(last * step, rows))

    _share(run, math.ceil(rows / step))


def _share(run: Callable[[int, int], None], parts: int) -> None:
    """Call run(first, last) over all parts, on as many threads as torch has, or as can be had."""
    threads = min(torch.get_num_threads(), parts)
    if threads <= 1:
        run(0, parts)
        return
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="sgc")
    edges = [parts * number // threads for number in range(threads + 1)]
    left, done = deque(itertools.pairwise(edges)), threading.Semaphore(0)

    def work() -> None:
        while left:
            try:
                edge = left.popleft()  # so that each is done once, whoever comes for it
            except IndexError:
                return
            try:
                run(*edge)
            finally:
                done.release()

    helpers = []
    with contextlib.suppress(RuntimeError):  # while the interpreter ends, no thread takes work, and none begins
        for _ in range(threads - 1):
            helpers.append(_pools[threads].submit(work))  # noqa: PERF401  # one that is refused leaves those before it
    work()
    for helper in helpers:
        helper.result()
    for _ in range(threads):
        done.acquire()


def _array(x: Tensor) -> Any:
    x = x.detach()
    return (x if x.is_contiguous() else x.contiguous()).numpy()


def _floats(*numbers: float) -> list[Any]:
    return list(torch.tensor(numbers, dtype=_FP32, device=_CPU).numpy())


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("numba") is not None


@functools.cache
def _loops() -> Any:
    from sgc.backends import loops

    return loops

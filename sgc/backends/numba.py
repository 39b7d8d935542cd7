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
from typing import Any

import torch
from torch import Tensor

from sgc import backends

PART_ENTRIES = 1 << 18  # rows or chunks of so many entries are one task, whatever the number of threads
BLOCK_ENTRIES = 1 << 20  # entries of a 16-bit gradient that are turned to fp32 at a time
MOST_INSERTED = 128  # beyond so many entries of a chunk, insertion takes longer than torch's partition
_CPU = torch.device("cpu")
_FP32 = torch.float32  # whatever torch's default dtype
_pools: dict[int, ThreadPoolExecutor] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # a child has none of its parent's threads


def choose() -> backends.Choice:
    """Say whether a CPU takes numba or torch, and why.

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


def usable(*tensors: Tensor) -> bool:
    """Whether numba takes these tensors: all on the CPU, plain and in fp32."""
    plain = all(
        type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.dtype is torch.float32 for x in tensors
    )
    return plain and choose().path == "numba"


def selects(sparsity: int) -> bool:
    """Whether numba would select so many entries of a chunk."""
    return sparsity <= MOST_INSERTED and choose().path == "numba"


def square_sums(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Give the sums of g² over the rows and the columns of a grid: (rows,) and (cols,)."""
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
    weight: Tensor, grid: Tensor, a: Tensor, b: Tensor, eps: float, clip: float, lr: float, decay: float
) -> None:
    """W ← (1 − decay)·W − lr·clip(g / (aᵢ·bⱼ + ε)) for a weight and a gradient seen as the same grid (rows, cols)."""
    arrays = (*map(_array, (weight.view_as(grid), grid, a, b)), *_floats(eps, clip, lr, 1 - decay))
    _share_rows(_loops().apply_whitened, grid.shape, arrays)


def select(
    grid: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    shape: tuple[int, int, int],
    sparsity: int,
    eps: float,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """Take the top entries of every chunk of some rows of a grid, whitened and clipped where a and b are given.

    Args:
        grid: a multiple of `rows_per_chunk` rows, or the last ones, (rows, cols).
        a: (rows,) or None.
        b: (cols,) or None.
        shape: n, the chunks of a row, and the rows of a chunk, one of both 1.
        sparsity: s, below n and at most MOST_INSERTED.
        eps: ε.
        clip: the largest |w|.

    Returns:
        index (c, s) int64, ascending in each chunk, and value (c, s).
    """
    chunk, pieces, rows_per_chunk = shape
    chunks = math.ceil(grid.shape[0] / rows_per_chunk) * pieces
    index = torch.empty(chunks, sparsity, dtype=torch.int64, device=_CPU)
    value = torch.empty(chunks, sparsity, dtype=_FP32, device=_CPU)
    whitening = [torch.empty(0, dtype=_FP32, device=_CPU)] * 2 if a is None or b is None else [a, b]
    scalars = _floats(eps, math.inf if a is None else clip)
    arrays = (
        *map(_array, (grid, *whitening)),
        *scalars,
        *shape,
        groups_of(chunk, sparsity),
        *map(_array, (index, value)),
    )
    _share_rows(_loops().select, (chunks, chunk), arrays)
    return index, value


def project(index: Tensor, value: Tensor, columns: Tensor, out: Tensor, sign: float = 1.0) -> Tensor:
    """Add ±A·x of sparse chunks, index and value (c, s), to out (c, k), which is given back; columns is Aᵀ (n, k)."""
    arrays = (*map(_array, (index, value, columns, out)), *_floats(sign))
    _share_rows(_loops().project, (index.shape[0], index.shape[1] * columns.shape[1]), arrays)
    return out


def recover(
    correlation: Tensor,
    words: Tensor,
    sketch_size: int,
    ridge: float,
    lengths: Tensor | None,
    index: Tensor,
    value: Tensor,
) -> None:
    """Put the s' largest |Aᵀy| of every chunk, and their least-squares values, into index and value (c, s').

    Args:
        correlation: Aᵀy, (c, n).
        words: the signs of A as bits, (⌈k/32⌉, n) int32.
        sketch_size: k.
        ridge: added to the diagonal of the Gram matrices.
        lengths: (c,) real entries of each chunk, or None.
        index: int64, s' at most MOST_INSERTED; ascending in each chunk.
        value: fp32; 0 on padding.
    """
    real = torch.empty(0, dtype=torch.int64, device=_CPU) if lengths is None else lengths
    arrays = (
        *map(_array, (correlation, words)),
        sketch_size,
        *_floats(ridge),
        _array(real),
        groups_of(correlation.shape[1], index.shape[1]),
        _array(index),
        _array(value),
    )
    _share_rows(_loops().recover, correlation.shape, arrays)


def groups_of(n: int, sparsity: int) -> int:
    """Give the number of groups that n entries are dealt into to find the s largest: about √(n·s), at least s."""
    width = 1 << (math.isqrt(max(1, n // sparsity)).bit_length() - 1)
    return max(sparsity, math.ceil(n / width))


def _share_rows(function: Callable[..., None], shape: tuple[int, ...] | torch.Size, arrays: tuple[Any, ...]) -> None:
    rows, entries = shape
    step = max(1, PART_ENTRIES // max(1, entries))

    def run(first: int, last: int) -> None:
        function(*arrays, first * step, min(last * step, rows))

    _share(run, math.ceil(rows / step))


def _share(run: Callable[[int, int], None], parts: int) -> None:
    """Do run(first, last) over all parts, on as many threads as torch has, or as can be had."""
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

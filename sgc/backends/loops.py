"""The stages as loops over chunks, compiled by numba: each reads a gradient once and writes no temporary of its size.

Every function works on a range of rows or chunks, so that threads can share them, and releases the lock of Python.
What a chunk needs fits in the first cache. `sgc.backends.numba` calls these; the oracles are in plain torch.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

_UNUSABLE = OSError, EOFError, pickle.UnpicklingError  # what numba may raise of the files of its cache


class _Cache(FunctionCache):
    """What is compiled, kept for other processes where it can be: a full disk or a damaged file only costs time."""

    def save_overload(self, *args: Any) -> None:
        with contextlib.suppress(*_UNUSABLE):
            super().save_overload(*args)

    def load_overload(self, *args: Any) -> Any:
        with contextlib.suppress(*_UNUSABLE):
            return super().load_overload(*args)
        return None


def _compile(function: Callable[..., Any], **options: Any) -> Any:
    compiled = numba.njit(nogil=True, error_model="numpy", **options)(function)
    with contextlib.suppress(RuntimeError):  # there is no place that can be written to
        compiled._cache = _Cache(function)  # as enable_caching does
    return compiled


def _compile_sums(function: Callable[..., Any]) -> Any:
    return _compile(function, fastmath={"reassoc", "nsz", "contract"})


_ZERO = np.float32(0)
_MAGNITUDE = np.int32(0x7FFFFFFF)  # all of a float but its sign
_LOWEST = np.int32(-(2**31))


@_compile_sums
def square_sums(grid: Any, row: Any, col: Any, first: int, last: int) -> None:
    """Put the sums of g² over some rows of the grid (rows, cols) into row (rows,), and add those to col (cols,)."""
    cols = grid.shape[1]
    for i in range(first, last):
        total = _ZERO
        for j in range(cols):
            square = grid[i, j] * grid[i, j]
            total += square
            col[j] += square
        row[i] = total


@_compile
def apply_whitened(
    weight: Any, grid: Any, a: Any, b: Any, eps: Any, clip: Any, lr: Any, keep: Any, first: int, last: int
) -> None:
    """W ← keep·W − lr·clip(g / (aᵢ·bⱼ + ε)) for some rows of (rows, cols)."""
    cols = grid.shape[1]
    for i in range(first, last):
        for j in range(cols):
            u = grid[i, j] / (a[i] * b[j] + eps)
            u = clip if u > clip else u
            u = -clip if u < -clip else u
            weight[i, j] = weight[i, j] * keep - lr * u


@_compile
def _top(bits: Any, count: int, groups: int, maxima: Any, best: Any, found: Any, place: Any) -> None:
    """Put the positions of the `count` largest of (width, groups) into place, ascending; of equals the lowest are kept.

    The groups, columns, with the largest maxima hold them. Without branches that are taken at random up to the choice
    among the few entries that reach the smallest of those maxima.

    Args:
        bits: of magnitudes, which sort as these do; negative: never before a magnitude. Padded with the lowest.
        count: of entries.
        groups: a multiple of which is padded to.
        maxima: (groups,), overwritten.
        best: (count,), overwritten.
        found: (entries of bits + 1,), overwritten.
        place: (count,), written.
    """
    maxima[:] = bits[:groups]
    for start in range(groups, len(bits), groups):
        line = bits[start : start + groups]
        for j in range(groups):
            maxima[j] = max(maxima[j], line[j])
    cut = _LOWEST
    for _ in range(count):  # the last of these is the cut: or lower, if groups tie
        cut = _LOWEST
        for j in range(groups):
            cut = max(cut, maxima[j])
        for j in range(groups):
            maxima[j] = _LOWEST if maxima[j] == cut else maxima[j]
    reached = 0
    for j in range(groups):  # the maxima that reach the cut are overwritten now
        found[reached] = j
        reached += maxima[j] == _LOWEST
    held = reached
    for start in range(0, len(bits), groups):
        line = bits[start : start + groups]
        for at in range(reached):
            j = found[at]
            found[held] = start + j
            held += line[j] >= cut
    candidates = found[reached:held]
    if len(candidates) > 2 * count:
        _insert_all(bits, candidates, best, place)
        return
    for left in range(len(candidates), count, -1):  # take out the smallest, of equals the last
        worst = 0
        for at in range(1, left):
            if bits[candidates[at]] <= bits[candidates[worst]]:
                worst = at
        for at in range(worst, left - 1):
            candidates[at] = candidates[at + 1]
    for at in range(count):
        place[at] = candidates[at]


@_compile
def _insert_all(bits: Any, candidates: Any, best: Any, place: Any) -> None:
    """Put the positions of the largest of some candidates, which ascend, into place, ascending."""
    count, held = len(place), 0
    for j in candidates:
        v = bits[j]
        if held == count and v <= best[count - 1]:
            continue
        held = min(held + 1, count)
        p = held - 1
        while p > 0 and best[p - 1] < v:
            best[p], place[p] = best[p - 1], place[p - 1]
            p -= 1
        best[p], place[p] = v, j
    place.sort()


@_compile
def _whiten(out: Any, grid: Any, a: Any, b: Any, eps: Any) -> None:
    for j in range(len(grid)):
        out[j] = grid[j] / (a * b[j] + eps)


@_compile
def select(
    grid: Any,
    a: Any,
    b: Any,
    eps: Any,
    clip: Any,
    chunk: int,
    pieces: int,
    rows_per_chunk: int,
    groups: int,
    index: Any,
    value: Any,
    first: int,
    last: int,
) -> None:
    """Put the top entries of some chunks of the grid (rows, cols), whitened and clipped, into index and value (c, s).

    Where a is empty, nothing is whitened. A chunk is a piece of a row, or several rows.
    """
    rows, cols = grid.shape
    count = index.shape[1]
    held, bits = np.empty(chunk, np.float32), np.full(-(-chunk // groups) * groups, _LOWEST)
    signed, maxima, best = held.view(np.int32), np.empty(groups, np.int32), np.empty(count, np.int32)
    found = np.empty(groups + len(bits) + 1, np.int32)
    for c in range(first, last):
        if rows_per_chunk > 1:
            row, start, length = c * rows_per_chunk, 0, cols
            lines = min(rows_per_chunk, rows - row)
        else:
            row, start, lines = c // pieces, c % pieces * chunk, 1
            length = min(chunk, cols - start)
        for line in range(lines):
            out = held[line * cols : line * cols + length]
            if len(a):
                _whiten(out, grid[row + line, start : start + length], a[row + line], b[start : start + length], eps)
            else:
                out[:] = grid[row + line, start : start + length]
        for j in range(lines * length, chunk):
            held[j] = _ZERO
        for j in range(chunk):
            bits[j] = signed[j] & _MAGNITUDE
        _top(bits, count, groups, maxima, best, found, index[c])
        for at in range(count):
            v = held[index[c, at]]
            v = clip if v > clip else v
            value[c, at] = -clip if v < -clip else v


@_compile
def project(index: Any, value: Any, columns: Any, out: Any, sign: Any, first: int, last: int) -> None:
    """Add sign·A·x of some sparse chunks, index and value (c, s), to out (c, k); columns is Aᵀ (n, k)."""
    k = columns.shape[1]
    for c in range(first, last):
        for at in range(index.shape[1]):
            j, v = index[c, at], sign * value[c, at]
            for i in range(k):
                out[c, i] += v * columns[j, i]


def _count_bits(context: Any, x: Any) -> Any:
    """Count the bits of an integer that are set."""
    return x(x), lambda _context, builder, _signature, arguments: builder.ctpop(arguments[0])


_ones: Callable[..., Any] = intrinsic(_count_bits)  # called without the context


@_compile
def recover(
    correlation: Any,
    words: Any,
    sketch_size: int,
    ridge: Any,
    length: Any,
    groups: int,
    index: Any,
    value: Any,
    first: int,
    last: int,
) -> None:
    """Put the s' largest |Aᵀy| of some chunks, and their least-squares values, into index and value (c, s').

    correlation is Aᵀy (c, n), words (⌈k/32⌉, n) the signs of A as bits; length (c,) says where a chunk's padding
    starts, empty: there is none.
    """
    n, count = correlation.shape[1], index.shape[1]
    bits, signed = np.full(-(-n // groups) * groups, _LOWEST), correlation.view(np.int32)
    maxima, best = np.empty(groups, np.int32), np.empty(count, np.int32)
    found = np.empty(groups + len(bits) + 1, np.int32)
    left, x = np.empty((count, count), np.float32), np.empty(count, np.float32)
    chosen = np.empty((count, len(words)), np.int32)
    unit = np.float32(1 / sketch_size)
    for c in range(first, last):
        real = length[c] if len(length) else n
        for j in range(real):
            bits[j] = signed[c, j] & _MAGNITUDE
        for j in range(real, n):
            bits[j] = -1
        place = index[c]
        _top(bits, count, groups, maxima, best, found, place)
        size = 0  # padding comes last
        while size < count and place[size] < real:
            x[size] = correlation[c, place[size]]
            size += 1
        if count > 1:
            for i in range(size):
                for word in range(len(words)):
                    chosen[i, word] = words[word, place[i]]
                for j in range(i):
                    opposite = 0
                    for word in range(len(words)):
                        opposite += _ones(np.uint32(chosen[i, word] ^ chosen[j, word]))
                    left[j, i] = np.float32(sketch_size - 2 * opposite) * unit
                left[i, i] = np.float32(sketch_size) * unit + ridge
            _eliminate(left, x, size)
        for at in range(size):
            value[c, at] = x[at]
        for at in range(size, count):
            value[c, at] = _ZERO


@_compile
def _eliminate(left: Any, x: Any, size: int) -> None:
    """Solve a positive definite system, of which the upper triangle is given, in place."""
    for at in range(size):
        row = left[at, :size]
        inverse = np.float32(1) / row[at]
        for i in range(at + 1, size):
            factor = row[i] * inverse
            below = left[i, :size]
            for j in range(i, size):
                below[j] -= factor * row[j]
            x[i] -= factor * x[at]
    for at in range(size - 1, -1, -1):
        row = left[at, :size]
        total = x[at]
        for i in range(at + 1, size):
            total -= row[i] * x[i]
        x[at] = total / row[at]

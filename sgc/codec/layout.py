"""Tensor ⇄ chunks: which entry of which chunk is which entry of the tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK_ENTRIES = 1 << 18  # entries worked on at a time: in cache, and small enough that the allocator reuses the memory
MATRIX_SHARE = 16  # a matrix view whose rows + cols exceed 1/16 of the entries is not worth its statistic


@dataclass(frozen=True)
class Layout:
    """How a tensor of `shape` is viewed as a (rows, cols) grid and cut into (chunks, chunk).

    The grid carries the factored second moment, the chunks carry the sketches. A chunk is a part of one grid row, which
    has `chunks_per_row` of them, or, where rows are short, `rows_per_chunk` whole rows. Only the tail of a row, or of
    the tensor, is padded.
    """

    shape: tuple[int, ...]
    rows: int  # of the grid
    cols: int  # of the grid
    chunk: int  # n, entries of a chunk
    chunks_per_row: int = 1  # chunks in a grid row
    rows_per_chunk: int = 1

    @property
    def numel(self) -> int:
        """Entries of the tensor, padding left out."""
        return math.prod(self.shape)

    @property
    def chunks(self) -> int:
        """c, the number of chunks."""
        return math.ceil(self.rows / self.rows_per_chunk) * self.chunks_per_row

    @property
    def padded(self) -> bool:
        """Whether any chunk holds entries that are not the tensor's."""
        return self.chunks * self.chunk != self.numel

    def rows_per_slice(self, unit: int = 1) -> int | None:
        """Return the grid rows in one index of dim 0; None where an index of it cuts a grid row, or `unit` rows."""
        if not self.shape or not self.numel:
            return None
        entries = self.numel // self.shape[0]
        return None if entries % (unit * self.cols) else entries // self.cols

    def grid(self, x: Tensor) -> Tensor:
        """View a tensor of `shape` as its (rows, cols) grid; a ragged tail is filled with zeros."""
        flat = x.reshape(-1)
        missing = self.rows * self.cols - flat.numel()
        return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(self.rows, self.cols)

    def window(self, start: int, stop: int, unit: int | None = None) -> Window:
        """Find the grid rows that entries start to stop of the flattened tensor touch, in whole multiples of `unit`.

        Args:
            start: the first entry of the part.
            stop: the one after its last.
            unit: grid rows that are not to be cut; None: those of a chunk.
        """
        unit = self.rows_per_chunk if unit is None else unit
        first = start // (unit * self.cols) * unit
        last = min(math.ceil(stop / (unit * self.cols)) * unit, self.rows) if stop > start else first
        begin, end = first * self.cols, min(last * self.cols, self.numel)
        seen = replace(self, shape=(end - begin,), rows=last - first)
        before = first // self.rows_per_chunk * self.chunks_per_row
        offset = start - begin if stop > start else 0
        return Window(slice(first, last), seen, offset, slice(before, before + seen.chunks))

    def cut(self, grid: Tensor) -> Tensor:
        """Cut some whole rows of the grid, a multiple of `rows_per_chunk` or the last ones, into (chunks, n)."""
        if self.rows_per_chunk > 1:
            missing = -grid.shape[0] % self.rows_per_chunk
            return (torch.nn.functional.pad(grid, (0, 0, 0, missing)) if missing else grid).reshape(-1, self.chunk)
        missing = self.chunks_per_row * self.chunk - self.cols
        return (torch.nn.functional.pad(grid, (0, missing)) if missing else grid).reshape(-1, self.chunk)

    def blocks(self, entries: int = BLOCK_ENTRIES) -> Iterator[tuple[slice, slice]]:
        """Yield (grid rows, chunks) slices of about `entries` entries each, no chunk cut in two."""
        unit = self.rows_per_chunk
        step = max(1, entries // max(1, unit * self.cols)) * unit
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            yield (
                slice(start, stop),
                slice(start // unit * self.chunks_per_row, math.ceil(stop / unit) * self.chunks_per_row),
            )

    def lengths(self, device: torch.device | str) -> Tensor | None:
        """Return the number of real entries in each chunk (c,), or None where no chunk is padded."""
        if not self.padded:
            return None
        length = torch.full((self.chunks,), self.chunk, dtype=torch.int64, device=device)
        if self.chunks_per_row > 1:
            length.view(-1, self.chunks_per_row)[:, -1] = self.cols - (self.chunks_per_row - 1) * self.chunk
        else:
            length[-1] = self.numel - (self.chunks - 1) * self.chunk
        return length

    def flat_index(self, index: Tensor) -> Tensor:
        """Turn positions inside chunks (c, s) into positions in the flattened tensor (c, s)."""
        chunk = torch.arange(self.chunks, device=index.device)
        if self.chunks_per_row > 1:
            start = chunk // self.chunks_per_row * self.cols + chunk % self.chunks_per_row * self.chunk
        else:
            start = chunk * self.chunk
        return index + start[:, None]

    def entries(self, index: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Turn what lies in chunks, index and value (c, s), into positions in the flattened tensor and values there.

        Padding is left out; both results are flat.
        """
        position, lengths = self.flat_index(index), self.lengths(index.device)
        if lengths is not None:
            real = index < lengths[:, None]
            position, value = position[real], value[real]
        return position.reshape(-1), value.reshape(-1)

    def scatter(self, index: Tensor, value: Tensor) -> Tensor:
        """Put what lies in chunks, index and value (c, s), into a flat tensor of zeros in fp32, padding left out."""
        flat = torch.zeros(self.numel, dtype=torch.float32, device=value.device)
        position, value = self.entries(index, value)
        flat[position] = value
        return flat


@dataclass(frozen=True)
class Window:
    """What a part of a tensor sees of it: the grid rows that it touches, and where among their entries it lies."""

    rows: slice  # of the tensor's grid
    layout: Layout  # of those rows
    offset: int  # entries of those rows before the first of the part
    chunks: slice  # of the tensor

    def grid(self, x: Tensor) -> Tensor:
        """Put the entries of the part in their rows, with zeros where entries are another's."""
        flat = x.reshape(-1)
        after = self.layout.rows * self.layout.cols - self.offset - flat.numel()
        flat = torch.nn.functional.pad(flat, (self.offset, after)) if self.offset or after else flat
        return flat.view(self.layout.rows, self.layout.cols)


@functools.lru_cache(maxsize=4096)
def _layout(shape: tuple[int, ...], chunk_size: int | None, within_rows: bool) -> Layout:
    numel = math.prod(shape)
    if numel == 0:
        return Layout(shape, 0, 0, 0)
    rows, cols = matrix_shape(shape)
    if rows == 1 or (not within_rows and rows + cols > max(numel // MATRIX_SHARE, 256)):
        chunk = numel if chunk_size is None else min(chunk_size, numel)
        return Layout(shape, math.ceil(numel / chunk), chunk, chunk)
    if chunk_size is None:
        return Layout(shape, rows, cols, cols if within_rows else numel, rows_per_chunk=1 if within_rows else rows)
    if 2 * cols < chunk_size and not within_rows:
        together = min(rows, round(chunk_size / cols))
        return Layout(shape, rows, cols, together * cols, rows_per_chunk=together)
    divisors = [n for n in range(math.ceil(chunk_size / 2), min(2 * chunk_size, cols) + 1) if cols % n == 0]
    if divisors:
        chunk = min(divisors, key=lambda n: (abs(n - chunk_size), n))
    else:
        chunk = math.ceil(cols / math.ceil(cols / chunk_size))
    return Layout(shape, rows, cols, chunk, chunks_per_row=math.ceil(cols / chunk))


def make_layout(shape: Sequence[int], chunk_size: int | None, *, within_rows: bool = False) -> Layout:
    """Choose the grid and the chunks of a tensor. (ours)

    A matrix is its own grid; a tensor of more dimensions is split where rows + cols is smallest, so a convolution
    becomes (out, in·h·w) and a stack of experts (experts·out, in). A vector, or a tensor with so few rows or columns
    that the statistic would be a burden, is cut as it lies. If a row has a divisor in [n/2, 2n], the one nearest to
    `chunk_size` is the chunk; else the row is cut into equal chunks with a padded tail. Rows shorter than n/2 share a
    chunk, unless `within_rows`.

    Args:
        shape: of the tensor.
        chunk_size: wanted entries of a chunk, n; None makes the whole tensor one chunk.
        within_rows: keep every chunk inside one grid row, as the turning of a low-rank basis needs.
    """
    return _layout(tuple(int(size) for size in shape), chunk_size, within_rows)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Split the dimensions into rows and columns where rows + cols is smallest; a vector is one row."""
    splits = [(math.prod(shape[:at]), math.prod(shape[at:])) for at in range(1, len(shape))]
    return min(splits, key=sum, default=(1, math.prod(shape)))


def is_compressed(shape: Sequence[int], min_size: int) -> bool:
    """Whether a tensor is sketched: it has `min_size` entries, or 16 times as many if it is a vector.

    Norms and biases are long in wide models and still few, so vectors stay dense for longer.
    """
    return math.prod(shape) >= max(1, min_size * (16 if len(shape) < 2 else 1))

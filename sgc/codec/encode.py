"""Gradient → sketch: whiten, sparsify and project the chunks of a grid, in blocks that fit the cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgc.backends import stage
from sgc.codec.layout import BLOCK_ENTRIES, Layout
from sgc.codec.project import Projection
from sgc.codec.sparsify import spread, top_entries

SELECTED = 4 * BLOCK_ENTRIES  # entries to select from at a time: calls cost little then, and so do temporaries


class Whitening(NamedTuple):
    """What a gradient is divided by: √v̂ᵢⱼ = aᵢ·bⱼ, plus ε; and a mask of the rows with nonzero gradient."""

    a: Tensor  # (rows,)
    b: Tensor  # (cols,)
    busy: Tensor | None  # (rows,) bool; None: all rows have gradient
    eps: float
    clip: float  # the largest |w|

    def of(self, rows: slice | Tensor) -> Whitening:
        """Return the whitening of some rows of the grid."""
        return self._replace(a=self.a[rows], busy=None if self.busy is None else self.busy[rows])

    def divide(self, block: Tensor) -> Tensor:
        """Return w = g / (√v̂ + ε) of the rows that this whitens, in fp32, not yet clipped."""
        return block.float() / torch.outer(self.a, self.b).add_(self.eps)


@stage("encode")
def encode(
    grid: Tensor,
    layout: Layout,
    projection: Projection,
    sparsity: int,
    whitening: Whitening | None = None,
    *,
    factor: Tensor | None = None,
    squares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Sparsify and project a grid, whitened where it is said by what.

    Args:
        grid: (rows, cols) of `layout`, any floating dtype, finite.
        layout: its chunks.
        projection: A.
        sparsity: s, entries of each chunk that are encoded.
        whitening: of all rows, or None.
        factor: multiplies the grid first, () fp32; None: 1.
        squares: whether the squares of the selected entries are sketched too.

    Returns:
        p = A·top_s(w), (c, min(k, n)) fp32, and q = A·top_s(w)² or None.
    """
    shape = (layout.chunks, min(projection.sketch_size, layout.chunk))
    p = torch.empty(shape, dtype=torch.float32, device=grid.device)
    q = torch.empty_like(p) if squares else None
    for rows, chunks in layout.blocks(SELECTED):
        block = grid[rows] if factor is None else grid[rows].to(torch.float32, copy=True).mul_(factor)
        index, value = _select_block(block, layout, None if whitening is None else whitening.of(rows), sparsity)
        p[chunks] = projection.project(index, value, layout.chunk)
        if q is not None:
            q[chunks] = projection.project(index, value.square(), layout.chunk)
    return p, q


@stage("encode")
def select(grid: Tensor, layout: Layout, whitening: Whitening | None, sparsity: int) -> tuple[Tensor, Tensor]:
    """Select the top entries of every chunk of a grid, whitened where it is said by what: index and value (c, s)."""
    blocks = [
        _select_block(grid[rows], layout, None if whitening is None else whitening.of(rows), sparsity)
        for rows, _ in layout.blocks(SELECTED)
    ]
    if not blocks:
        return grid.new_zeros((0, sparsity), dtype=torch.int64), grid.new_zeros((0, sparsity), dtype=torch.float32)
    index, value = zip(*blocks, strict=True)
    return torch.cat(index), torch.cat(value)


def _select_block(block: Tensor, layout: Layout, whitening: Whitening | None, sparsity: int) -> tuple[Tensor, Tensor]:
    """Select from some rows, given their whitening; rows without gradient are not looked at."""
    busy = None if whitening is None or layout.rows_per_chunk > 1 else whitening.busy
    if whitening is None or busy is None or busy.all():
        return top(block.float(), layout, whitening, sparsity)
    found = top(block[busy].float(), layout, whitening.of(busy), sparsity)
    return spread(*found, busy.repeat_interleave(layout.chunks_per_row))


@stage("encode")
def top(block: Tensor, layout: Layout, whitening: Whitening | None, sparsity: int) -> tuple[Tensor, Tensor]:
    """Select the top entries of every chunk of some whole rows in fp32, whitened and clipped."""
    if whitening is None:
        return top_entries(layout.cut(block), sparsity)
    index, value = top_entries(layout.cut(whitening.divide(block)), sparsity)
    return index, value.clamp_(-whitening.clip, whitening.clip)

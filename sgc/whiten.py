"""Whiten: the factored second moment, R and C, moved by the squares of a gradient, and √v̂ᵢⱼ = aᵢ·bⱼ made of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sgc import backends
from sgc.codec.encode import Whitening
from sgc.codec.layout import BLOCK_ENTRIES, Layout
from sgc.constants import CLIP, FLOOR


@backends.stage("statistics")
def square_sums(grid: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Sum g² over the rows and over the columns of a grid: (rows,) and (cols,) in fp32."""
    row = grid.new_empty(layout.rows, dtype=torch.float32)
    col = grid.new_zeros(layout.cols, dtype=torch.float32)
    for rows, _ in layout.blocks():
        square = grid[rows].float().square()
        row[rows] = square.sum(1)
        col += square.sum(0)
    return row, col


def means(row: Tensor, col: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Turn the sums over rows and columns into means, in place, padding left out."""
    row /= layout.cols
    col /= layout.rows
    ragged = layout.rows * layout.cols - layout.numel  # a vector's last grid row ends early
    if ragged:
        row[-1:] *= layout.cols / (layout.cols - ragged)
    if ragged and layout.rows > 1:
        col[-ragged:] *= layout.rows / (layout.rows - 1)
    return row, col


def mean_squares(grid: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Compute the row and column means of g², (rows,) and (cols,) in fp32, padding left out."""
    return means(*square_sums(grid, layout), layout)


def whiten(
    state: Mapping[str, Tensor],
    row: Tensor,
    col: Tensor,
    beta2: float,
    eps: float,
    t: int,
    mean: Tensor | None = None,
) -> Whitening:
    """Move R and C of a tensor's state by the row and column means of g², and return what whitens this gradient.

    Args:
        state: with "row" and "col", changed in place.
        row: (rows,).
        col: (cols,).
        beta2: β2.
        eps: ε.
        t: updates made, from 1, this one in.
        mean: as for `factor`.
    """
    busy = row > 0  # of an embedding, only the rows of tokens that were seen are
    a, b = factor(state["row"], state["col"], row, col, beta2, t, mean)
    # a kernel looks at each row's, and spares the host a wait
    return Whitening(a, b, None if not backends.fused(row.device) and busy.all() else busy, eps, CLIP)


def factor(
    row: Tensor,
    col: Tensor,
    row_mean: Tensor,
    col_mean: Tensor,
    beta2: float,
    t: int,
    mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Update the factored second moment and return its root: √v̂ᵢⱼ = aᵢ·bⱼ. (after Adafactor, arXiv 1804.04235)

    R and C are bias-corrected EMAs of the row and column means of g², this gradient in, and are floored at 1e-4 of
    their mean: v̂ᵢⱼ = R̂ᵢ·Ĉⱼ / mean(R̂).

    Args:
        row: R, of rows entries in any shape, changed in place.
        col: C (cols,), changed in place.
        row_mean: means of g² along the rows, (rows,).
        col_mean: means of g² along the columns, (cols,).
        beta2: β2.
        t: updates made, from 1.
        mean: of all of R after this update, where `row` is a shard of it; None: that of `row`.

    Returns:
        a (rows,) and b (cols,).
    """
    correction = 1 - beta2**t
    row_hat = row.view(-1).lerp_(row_mean, 1 - beta2) / correction
    col_hat = col.lerp_(col_mean, 1 - beta2) / correction
    mean = row_hat.mean() if mean is None else mean / correction
    mean = mean.clamp(min=torch.finfo(torch.float32).tiny)  # squares of 1e-22 vanish
    row_hat = torch.maximum(row_hat, FLOOR * mean)
    col_hat = torch.maximum(col_hat, FLOOR * col_hat.mean())
    return (row_hat / mean).sqrt(), col_hat.sqrt()


def gradient_norm(gradient: Tensor) -> Tensor:
    """Compute ‖g‖₂ in fp32, () shaped, of float64 by way of fp32; no fp32 copy of a 16-bit gradient is made whole."""
    if gradient.dtype is torch.float64:
        gradient = gradient.float()
    if gradient.dtype is torch.float32 or gradient.is_cuda or not gradient.is_contiguous():  # a GPU casts as it reads
        return torch.linalg.vector_norm(gradient, dtype=torch.float32)
    parts = [
        torch.linalg.vector_norm(part, dtype=torch.float32) for part in gradient.view(-1).split(16 * BLOCK_ENTRIES)
    ]
    return torch.linalg.vector_norm(torch.stack(parts)) if len(parts) > 1 else parts[0]

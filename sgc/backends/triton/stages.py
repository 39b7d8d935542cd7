"""The stages that have a kernel, by the names and arguments of their twins in torch; NotImplemented where one can't.

What keeps a kernel from taking a stage is warned about once, by `sgc.backends`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgc.backends import choose
from sgc.backends.triton import encode as encoding
from sgc.backends.triton import recover as recovering
from sgc.backends.triton import scatter, whitened
from sgc.backends.triton.table import DTYPES

if TYPE_CHECKING:
    from sgc.codec.encode import Whitening
    from sgc.codec.layout import Layout
    from sgc.codec.project import Projection


def square_sums(grid: Tensor, layout: Layout) -> Any:
    """Compute `sgc.whiten.square_sums`."""
    obstacle = None if grid.dtype in DTYPES else f"gradients are {grid.dtype}"
    if not choose("statistics", grid.device, obstacle).fused:
        return NotImplemented
    return whitened.square_sums(grid, layout)


def encode(
    grid: Tensor,
    layout: Layout,
    projection: Projection,
    sparsity: int,
    whitening: Whitening | None = None,
    *,
    factor: Tensor | None = None,
    squares: bool = False,
) -> Any:
    """Compute `sgc.codec.encode.encode`."""
    if not _takes(grid, layout, sparsity, projection):
        return NotImplemented
    eps, factors = (0.0, None) if whitening is None else (whitening.eps, whitening[:3])
    grid = grid.contiguous()
    return encoding.encode(grid, layout, factors, projection, sparsity, eps, factor=factor, squares=squares)


def select(grid: Tensor, layout: Layout, whitening: Whitening | None, sparsity: int) -> Any:
    """Compute `sgc.codec.encode.select`."""
    if not _takes(grid, layout, sparsity, None):
        return NotImplemented
    eps, factors = (0.0, None) if whitening is None else (whitening.eps, whitening[:3])
    return encoding.select(grid.contiguous(), layout, factors, sparsity, eps)


def _takes(grid: Tensor, layout: Layout, sparsity: int, projection: Projection | None) -> bool:
    return choose("encode", grid.device, encoding.obstacle(layout, grid.dtype, sparsity, projection)).fused


def recover(
    sketch: Tensor, layout: Layout, projection: Projection, sparsity: int, method: str = "omp", *, take: bool = False
) -> Any:
    """Compute `sgc.codec.recover.recover`."""
    obstacle = recovering.obstacle(layout, projection, sparsity, method)
    if take and not sketch.is_contiguous():
        obstacle = "the sketch is not contiguous"
    if not choose("recover", sketch.device, obstacle).fused:
        return NotImplemented
    return recovering.recover(sketch.contiguous(), layout, projection, sparsity, take=take)


def apply_sparse(
    weight: Tensor,
    layout: Layout,
    index: Tensor,
    value: Tensor,
    lr: float,
    decay: float,
    generator: torch.Generator | None,
) -> Any:
    """Compute `sgc.apply.apply_sparse`."""
    if not choose("apply", weight.device, scatter.obstacle(weight, layout)).fused:
        return NotImplemented
    seed = None if generator is None else generator.initial_seed()
    scatter.apply(weight, layout, index.contiguous(), value.contiguous(), lr, decay, seed)
    return None


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
    """Compute `sgc.apply.apply_whitened`."""
    dtypes = [tensor.dtype for tensor in (weight, grid) if tensor.dtype not in DTYPES]
    if not choose("apply", weight.device, f"its dtype is {dtypes[0]}" if dtypes else None).fused:
        return NotImplemented
    a = whitening.a if whitening.busy is None else whitening.a * whitening.busy
    seed = None if generator is None else generator.initial_seed()
    if weight.numel():
        grid = grid.contiguous()
        whitened.apply_whitened(weight, grid, layout, a, whitening.b, whitening.eps, lr, decay, seed, offset)
    return None

"""The stages of the sketch path that have a kernel: each gives what its twin in torch gives, or None where that must.

What keeps a kernel from taking a stage is warned about once, by `sgc.backends`. Triton is imported when it is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sgc import backends
from sgc.codec.layout import Layout
from sgc.codec.project import Projection

Whitening = tuple[Tensor, Tensor, Tensor | None]  # as `sgc.step.Whitening`


def encode(
    grid: Tensor,
    layout: Layout,
    whitening: Whitening | None,
    projection: Projection,
    sparsity: int,
    eps: float,
    *,
    factor: Tensor | None = None,
    squares: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """Do as `sgc.step.encode`."""
    if not _takes_encode(grid, layout, sparsity, projection):
        return None
    from sgc.backends.triton import encode as kernel

    grid = grid.contiguous()
    return kernel.encode(grid, layout, whitening, projection, sparsity, eps, factor=factor, squares=squares)


def encode_into(
    moment: Tensor,
    beta: float,
    rule: str,
    grid: Tensor,
    layout: Layout,
    whitening: Whitening | None,
    projection: Projection,
    sparsity: int,
    eps: float,
) -> bool:
    """Encode and, in the same pass, move the moment of "residual" or "whitened" in place; whether it has been done."""
    if not moment.is_contiguous() or not _takes_encode(grid, layout, sparsity, projection):
        return False
    from sgc.backends.triton import encode as kernel

    into = kernel.Into(moment, "residual" if rule == "residual" else "ema", beta)
    kernel.encode(grid.contiguous(), layout, whitening, projection, sparsity, eps, into=into)
    return True


def select(
    grid: Tensor, layout: Layout, whitening: Whitening | None, sparsity: int, eps: float
) -> tuple[Tensor, Tensor] | None:
    """Do as `sgc.step.select`."""
    if not _takes_encode(grid, layout, sparsity, None):
        return None
    from sgc.backends.triton import encode as kernel

    return kernel.select(grid.contiguous(), layout, whitening, sparsity, eps)


def _takes_encode(grid: Tensor, layout: Layout, sparsity: int, projection: Projection | None) -> bool:
    if not backends.choose("encode", grid.device).fused:
        return False
    from sgc.backends.triton import encode as kernel

    return backends.choose("encode", grid.device, kernel.obstacle(layout, grid.dtype, sparsity, projection)).fused


def decode(
    sketch: Tensor, layout: Layout, projection: Projection, recovered: int, method: str, *, take: bool = False
) -> tuple[Tensor, Tensor] | None:
    """Do as `sgc.codec.recover.recover`; with `take`, what is recovered leaves the sketch in the same pass."""
    if not backends.choose("decode", sketch.device).fused:
        return None
    from sgc.backends.triton import decode as kernel

    obstacle = kernel.obstacle(layout, projection, recovered, method)
    if take and not sketch.is_contiguous():
        obstacle = "the sketch is not contiguous"
    if not backends.choose("decode", sketch.device, obstacle).fused:
        return None
    return kernel.decode(sketch.contiguous(), layout, projection, recovered, take=take)


def apply(
    weight: Tensor,
    layout: Layout,
    index: Tensor,
    value: Tensor,
    lr: float,
    decay: float,
    generator: torch.Generator | None,
) -> bool:
    """Do as `sgc.step.apply_sparse`; whether it has been done."""
    if not backends.choose("apply", weight.device).fused:
        return False
    from sgc.backends.triton import decode as kernel

    if not backends.choose("apply", weight.device, kernel.move_obstacle(weight, layout)).fused:
        return False
    seed = None if generator is None else generator.initial_seed()
    kernel.apply(weight, layout, index.contiguous(), value.contiguous(), lr, decay, seed)
    return True


def square_sums(grid: Tensor, layout: Layout) -> tuple[Tensor, Tensor] | None:
    """Do as `sgc.step.square_sums`."""
    if not backends.choose("statistics", grid.device).fused:
        return None
    from sgc.backends.triton import dense as kernel

    obstacle = None if grid.dtype in kernel.DTYPES else f"gradients are {grid.dtype}"
    if not backends.choose("statistics", grid.device, obstacle).fused:
        return None
    return kernel.square_sums(grid, layout)


def apply_whitened(
    weight: Tensor,
    grid: Tensor,
    layout: Layout,
    whitening: Whitening,
    eps: float,
    lr: float,
    decay: float,
    generator: torch.Generator | None,
    offset: int,
) -> bool:
    """Do as `sgc.step.apply_whitened`; whether it has been done."""
    if not backends.choose("apply", weight.device).fused:
        return False
    from sgc.backends.triton import dense as kernel

    dtypes = [tensor.dtype for tensor in (weight, grid) if tensor.dtype not in kernel.DTYPES]
    if not backends.choose("apply", weight.device, f"its dtype is {dtypes[0]}" if dtypes else None).fused:
        return False
    a, b, busy = whitening
    a = a if busy is None else a * busy
    seed = None if generator is None else generator.initial_seed()
    if weight.numel():
        kernel.apply_whitened(weight, grid.contiguous(), layout, a, b, eps, lr, decay, seed, offset)
    return True

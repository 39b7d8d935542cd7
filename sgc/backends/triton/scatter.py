"""The scatter of what is recovered into the weights. The twin is `sgc.apply.apply_sparse`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgc.backends.triton.chunks import (
    is_real,
    on_device_of,
    power_of_two,
    shape_of,
    start_of,
)
from sgc.backends.triton.table import mixed, noise_of

if TYPE_CHECKING:
    from sgc.codec.layout import Layout

MOST_MOVED = 4096  # entries of a chunk of which some move: with weight decay, all of them are held
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


def obstacle(weight: Tensor, layout: Layout) -> str | None:
    """Return why the kernel can't move entries of such weights, or None."""
    if weight.dtype not in WEIGHTS:
        return f"weights are {weight.dtype}"
    if layout.chunk > MOST_MOVED:
        return f"a chunk has {layout.chunk} entries, more than {MOST_MOVED}"
    return None


def apply(
    weight: Tensor,
    layout: Layout,
    index: Tensor,
    value: Tensor,
    lr: float,
    decay: float,
    seed: int | None,
    *,
    norm: Tensor | None = None,
) -> None:
    """W ← (1 − decay)·W − lr·u, u scattered at its coordinates; without decay only those are touched.

    Args:
        weight: contiguous, of `layout.shape`.
        layout: its chunks.
        index: (c, s') int64 in [0, n), no two alike in a chunk.
        value: (c, s') fp32.
        lr: learning rate times scale, negative to maximize.
        decay: learning rate times weight decay.
        seed: of stochastic rounding to bf16; None rounds to nearest.
        norm: of the gradient, () fp32: unless it is finite, W does not decay.
    """
    if not layout.chunks:
        return
    count = index.shape[1]
    slots, entries = power_of_two(count), power_of_two(layout.chunk)
    tile = max(1, 1024 // (entries if decay else slots))
    with on_device_of(weight):
        _apply[(triton.cdiv(layout.chunks, tile),)](
            weight,
            index,
            value,
            norm,
            layout.chunks,
            layout.numel,
            lr,
            1 - decay,
            0 if seed is None else (seed ^ seed >> 32) & 0x7FFFFFFF,
            S=count,
            SLOTS=slots,
            C=tile,
            ENTRIES=entries,
            DECAYS=decay != 0,
            STOCHASTIC=seed is not None and weight.dtype is torch.bfloat16,
            num_warps=4,
            enable_fp_fusion=False,
            **shape_of(layout),
        )


@triton.jit
def _store(weight, at, x, chunk, entry, seed, mask, STOCHASTIC: tl.constexpr):
    """Store fp32 in the dtype of the weights; to bf16 up or down at random, so that the mean of the result is x."""
    if weight.dtype.element_ty == tl.bfloat16:  # the upper half of an fp32; to nearest, where not at random
        bits = x.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            low, high = chunk.to(tl.uint32), (chunk >> 32).to(tl.uint32)
            key = mixed(low ^ mixed(high ^ mixed(seed.to(tl.uint32))))
            bits += noise_of(key, mixed(entry.to(tl.uint32) + 1))
        else:
            bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    tl.store(weight + at, x.to(weight.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["norm", "chunks", "numel", "lr", "keep", "seed"])
def _apply(
    weight, index, value, norm, chunks, numel, lr, keep, seed,
    S: tl.constexpr, SLOTS: tl.constexpr, C: tl.constexpr, ENTRIES: tl.constexpr, DECAYS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    N: tl.constexpr, COLS: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """W ← keep·W − lr·u.

    Bytes: 12·s'/n for each entry of a chunk read, and a sector of 32 bytes of W read and written for each of the s';
    with DECAYS all of W read and written, once.
    """
    if norm is not None:
        keep = tl.where(tl.load(norm) < float("inf"), keep, 1.0)
    chunk = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    here = (chunk < chunks) & (slot < S)
    moved = tl.load(index + chunk * S + slot, mask=here, other=0).to(tl.int32)
    u = tl.load(value + chunk * S + slot, mask=here, other=0.0)
    here &= is_real(chunk, moved, chunks, numel, N, COLS, PIECES, PADDED)
    start = start_of(chunk, N, COLS, PIECES)
    old = tl.load(weight + start + moved, mask=here, other=0.0).to(tl.float32)
    if DECAYS:
        entry = tl.arange(0, ENTRIES)[None, :]
        inside = is_real(chunk, entry, chunks, numel, N, COLS, PIECES, PADDED)
        kept = tl.load(weight + start + entry, mask=inside, other=0.0).to(tl.float32) * keep
        tl.debug_barrier()  # all old weights have been read
        _store(weight, start + entry, kept, chunk, entry, seed, inside, STOCHASTIC)
        tl.debug_barrier()  # and what decayed is written, before what moved
        old = old * keep
    _store(weight, start + moved, old - lr * u, chunk, moved, seed, here, STOCHASTIC)

"""The fused sparse projection: whiten, sparsify, project and move the moments in one read of the gradient.

The twins are `sgc.step.encode` and `sgc.step.select`, and for the moments `sgc.moments.residual` and `whitened`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgc.codec.layout import Layout
from sgc.codec.project import Projection
from sgc.kernels.chunks import (
    NO_TAG,
    OUTSIDE,
    candidates_of,
    group_length,
    is_real,
    magnitude,
    on_device_of,
    power_of_two,
    project_word,
    root_of,
    shape_of,
    signed,
    start_of,
    tag_of,
    take_top,
)
from sgc.moments import CLIP

MOST_ENTRIES = 4096  # of a chunk: a tile is held in registers
MOST_SPARSITY = 64  # the rounds of selection are as many
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SLACK = tl.constexpr(16)  # units in the last place; a product with a reciprocal is wrong by 4 at most
TILE = 512  # entries for which one warp works, or those of a chunk, if they are more; beyond 1024, four warps


class Into(NamedTuple):
    """Where a sketch goes: the held moment (c, k) fp32, and how it moves."""

    moment: Tensor
    rule: str  # "residual": E ← ρE + p; "ema": M ← M + (1 − β1)(p − M)
    beta: float  # ρ or β1


def obstacle(layout: Layout, dtype: torch.dtype, sparsity: int, projection: Projection | None) -> str | None:
    """Say why the kernel can't encode such chunks, or None."""
    if dtype not in DTYPES:
        return f"gradients are {dtype}"
    if layout.chunk > MOST_ENTRIES:
        return f"a chunk has {layout.chunk} entries, more than {MOST_ENTRIES}"
    if sparsity > min(MOST_SPARSITY, layout.chunk - 1):
        return f"sparsity={sparsity} is more than {min(MOST_SPARSITY, layout.chunk - 1)}"
    if projection is not None and projection.sketch_size >= layout.chunk:
        return f"sketch_size={projection.sketch_size} is no less than the {layout.chunk} entries of a chunk"
    return None


def encode(
    gradient: Tensor,
    layout: Layout,
    whitening: tuple[Tensor, Tensor, Tensor | None] | None,
    projection: Projection,
    sparsity: int,
    eps: float,
    *,
    factor: Tensor | None = None,
    into: Into | None = None,
    squares: bool = False,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sparsify and project a gradient, whitened where it is told by what.

    Args:
        gradient: of `layout.numel` entries, contiguous, finite; a padded grid of them will do.
        layout: its chunks.
        whitening: a (rows,), b (cols,) and busy (rows,) of `sgc.step.Whitening`, or None; a row where a is 0 is not
            busy.
        projection: A.
        sparsity: s.
        eps: ε.
        factor: multiplies the gradient first, () fp32.
        into: the moment that takes the sketch, in place.
        squares: also give the sketch of the squares.
        norm: of the gradient, () fp32: unless it is finite and above 0, p is 0 and E stays as it is. For "residual".

    Returns:
        The moment as it is now, or without one p (c, k) fp32; and q (c, k) fp32, or None.
    """
    shape = (layout.chunks, projection.sketch_size)
    out = into.moment if into is not None else gradient.new_empty(shape, dtype=torch.float32)
    square = gradient.new_empty(shape, dtype=torch.float32) if squares else None
    words = projection.words(layout.chunk, gradient.device)
    mode = 0 if into is None else {"residual": 1, "ema": 2}[into.rule]
    beta = 0.0 if into is None else into.beta
    k = projection.sketch_size
    _launch(gradient, factor, norm, layout, whitening, sparsity, eps, words, k, out, square, mode, beta)
    return out, square


def select(
    gradient: Tensor,
    layout: Layout,
    whitening: tuple[Tensor, Tensor, Tensor | None] | None,
    sparsity: int,
    eps: float,
    *,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take the top entries of every chunk: index (c, s) int64, ascending, and value (c, s) fp32; arguments as above."""
    index = gradient.new_empty((layout.chunks, sparsity), dtype=torch.int64)
    value = gradient.new_empty((layout.chunks, sparsity), dtype=torch.float32)
    _launch(gradient, None, norm, layout, whitening, sparsity, eps, None, 0, index, value, 3, 0.0)
    return index, value


def _launch(
    gradient: Tensor,
    factor: Tensor | None,
    norm: Tensor | None,
    layout: Layout,
    whitening: tuple[Tensor, Tensor, Tensor | None] | None,
    sparsity: int,
    eps: float,
    words: Tensor | None,
    sketch_size: int,
    out: Tensor,
    square: Tensor | None,
    mode: int,
    beta: float,
) -> None:
    if not layout.chunks:
        return
    a, b, busy = (None, None, None) if whitening is None else whitening
    if a is not None and busy is not None and layout.rows_per_chunk == 1:  # else whitened whole, as in the twin
        a = a * busy
    entries, slots = power_of_two(layout.chunk), power_of_two(sparsity)
    warps = 1 if entries <= 2 * TILE else 4
    tile = max(1, TILE // entries)
    with on_device_of(gradient):
        _encode[(triton.cdiv(layout.chunks, tile),)](
            gradient,
            factor,
            norm,
            a,
            b,
            words,
            out,
            square,
            layout.chunks,
            layout.numel,
            eps,
            beta,
            1 - beta,
            root_of(sketch_size) if sketch_size else 1.0,
            0 if words is None else words.shape[1],
            WHITEN=whitening is not None,
            CLIP_AT=CLIP,
            K=sketch_size,
            S=sparsity,
            SLOTS=slots,
            LENGTH=group_length(entries, slots),
            C=tile,
            ENTRIES=entries,
            MODE=mode,
            QUOTIENT="fast" if isinstance(_encode, triton.JITFunction) else "by reciprocal",
            num_warps=warps,
            enable_fp_fusion=False,  # w and ρE + p are rounded as torch rounds them
            **shape_of(layout),
        )


@triton.jit
def _whitened(
    gradient, factor, a, b, chunk, entry, chunks, numel, eps,
    WHITEN: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr, QUOTIENT: tl.constexpr,
):  # fmt: skip
    """Load entries (C or 1, W) of chunks (C, 1): w = g/(a·b + ε) in fp32; 0 on padding and where a is 0."""
    real = is_real(chunk, entry, chunks, numel, N, COLS, PIECES, PADDED) & (entry >= 0)
    w = tl.load(gradient + start_of(chunk, N, COLS, PIECES) + entry, mask=real, other=0.0).to(tl.float32)
    if factor is not None:
        w *= tl.load(factor)
    if WHITEN:
        if ROWS > 1:
            row = chunk * ROWS + entry // COLS
            left = tl.load(a + row, mask=real, other=1.0)
            right = tl.load(b + entry % COLS, mask=(entry >= 0) & (entry < N), other=1.0)
        else:
            row = chunk // PIECES
            left = tl.load(a + row, mask=chunk < chunks, other=1.0)
            if PIECES > 1:
                right = tl.load(b + chunk % PIECES * N + entry, mask=real, other=1.0)
            else:
                right = tl.load(b + entry, mask=(entry >= 0) & (entry < N), other=1.0)
        busy = left > 0
        root = tl.where(busy, left, 1.0) * right + eps
        if QUOTIENT == "exact":
            w = tl.div_rn(w, root)
        elif QUOTIENT == "fast":
            w *= tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [root], tl.float32, True, 1)
        else:
            w *= 1.0 / root
        w = tl.where(busy, w, 0.0)
    return w


@triton.jit
def _chosen(
    gradient, factor, a, b, chunk, chunks, numel, eps,
    WHITEN: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr, QUOTIENT: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr, LENGTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """Keys and tags (C, SLOTS) of the top entries, and the largest key (C,) of the groups that were left out.

    Groups are chosen by w as QUOTIENT makes it, entries of those groups by the exact w.
    """
    entry = tl.arange(0, ENTRIES)[None, :]
    w = _whitened(
        gradient, factor, a, b, chunk, entry, chunks, numel, eps,
        WHITEN, N, COLS, PIECES, ROWS, PADDED, QUOTIENT,
    )  # fmt: skip
    few, rest = candidates_of(tl.where(entry < N, magnitude(w), OUTSIDE), S, SLOTS, LENGTH)
    w = _whitened(
        gradient, factor, a, b, chunk, few, chunks, numel, eps,
        WHITEN, N, COLS, PIECES, ROWS, PADDED, "exact",
    )  # fmt: skip
    key = tl.where((few >= 0) & (few < N), magnitude(w), OUTSIDE)
    key, tag, _ = take_top(key, tl.where(few >= 0, tag_of(few, w), -2), S, SLOTS)
    return key, tag, rest


@triton.jit(do_not_specialize=["norm", "chunks", "numel", "eps", "beta", "weight", "root", "held"])
def _encode(
    gradient, factor, norm, a, b, words, out, square, chunks, numel, eps, beta, weight, root, held,
    WHITEN: tl.constexpr, CLIP_AT: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr,
    LENGTH: tl.constexpr, C: tl.constexpr, ENTRIES: tl.constexpr, MODE: tl.constexpr, QUOTIENT: tl.constexpr,
    N: tl.constexpr, COLS: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """p = A·top_s(w), and what becomes of it: MODE 0 p, 1 E ← ρE + p, 2 M ← M + (1 − β1)(p − M), 3 index and value.

    Bytes: the gradient once, the sketch written once and in modes 1 and 2 read once (4·k/n of fp32 each), a and b from
    the cache. Operations for each entry of a chunk: about 12 to whiten, 2 for its group's maximum, and for the s rounds
    12·s·√(s/n) over group maxima and candidates.
    """
    chunk = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)[:, None]
    key, tag, rest = _chosen(
        gradient, factor, a, b, chunk, chunks, numel, eps,
        WHITEN, N, COLS, PIECES, ROWS, PADDED, QUOTIENT, S, SLOTS, LENGTH, ENTRIES,
    )  # fmt: skip
    if WHITEN:
        # an entry left out is at most SLACK larger than it was thought to be; in one chunk of 10⁵ that is too close
        last = tl.min(tl.where(tl.arange(0, SLOTS)[None, :] < S, key, NO_TAG), 1)
        unsure = (rest > 0) & (rest + SLACK >= last)
        if tl.max(unsure.to(tl.int32), 0) > 0:
            key, tag, rest = _chosen(
                gradient, factor, a, b, chunk, chunks, numel, eps,
                WHITEN, N, COLS, PIECES, ROWS, PADDED, "exact", S, SLOTS, LENGTH, ENTRIES,
            )  # fmt: skip
    index, value = tag >> 1, signed(key, tag)
    if WHITEN:
        value = tl.minimum(tl.maximum(value, -CLIP_AT), CLIP_AT)
    if norm is not None:
        moves = (tl.load(norm) > 0) & (tl.load(norm) < float("inf"))
        value = tl.where(moves, value, 0.0)
        beta = tl.where(moves, beta, 1.0)
    if MODE == 3:
        slot = tl.arange(0, SLOTS)
        before = (index[:, None, :] < index[:, :, None]) & (slot < S)[None, None, :]
        place = chunk * S + tl.sum(before.to(tl.int32), 2)
        here = (chunk < chunks) & (slot < S)[None, :]
        tl.store(out + place, index.to(tl.int64), mask=here)
        tl.store(square + place, value, mask=here)
    else:
        for number in range((K + 31) // 32):
            row = number * 32 + tl.arange(0, 32)[None, :]
            here = (chunk < chunks) & (row < K)
            at = chunk * K + row
            p = project_word(words, number, index, value * root, held, N)
            if MODE == 1:
                p = tl.load(out + at, mask=here) * beta + p
            if MODE == 2:
                moment = tl.load(out + at, mask=here)
                p = moment + weight * (p - moment)
            tl.store(out + at, p, mask=here)
            if square is not None:
                q = project_word(words, number, index, value * value * root, held, N)
                tl.store(square + at, q, mask=here)

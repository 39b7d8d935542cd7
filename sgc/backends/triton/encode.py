"""The fused sparse projection: whiten, sparsify, project and move the moments in one read of the gradient.

The twins are `encode` and `select` of `sgc.codec.encode`; how moments move is `sgc.moments`'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgc.backends.triton.chunks import (
    NO_TAG,
    TAKEN,
    flipped,
    group_length,
    magnitude,
    on_device_of,
    power_of_two,
    root_of,
    shape_of,
    tag_of,
)
from sgc.constants import CLIP

if TYPE_CHECKING:
    from sgc.codec.layout import Layout
    from sgc.codec.project import Projection

MOST_ENTRIES = 4096  # of a chunk: a tile is held in registers
MOST_SPARSITY = 64  # the rounds of selection are as many
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SLACK = tl.constexpr(16)  # units in the last place; a product with a reciprocal is wrong by 4 at most
TILE = 512  # entries for which one warp works, or those of a chunk, if they are more; beyond 1024, four warps


class Into(NamedTuple):
    """Where a sketch goes: the held moment (c, k) fp32, and how it moves."""

    moment: Tensor
    beta: float  # ρ or β1
    averages: bool  # M ← M + (1 − β1)(p − M); else E ← ρE + p


def obstacle(layout: Layout, dtype: torch.dtype, sparsity: int, projection: Projection | None) -> str | None:
    """Return why the kernel can't encode such chunks, or None."""
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
        whitening: a (rows,), b (cols,) and busy (rows,), as in `sgc.codec.encode.Whitening`, or None; a row where a is
            0 is not busy.
        projection: A.
        sparsity: s.
        eps: ε.
        factor: multiplies the gradient first, () fp32.
        into: the moment that takes the sketch, in place.
        squares: whether the squares are sketched, too.
        norm: of the gradient, () fp32: unless it is finite and above 0, p is 0 and E stays as it is; not for averages.

    Returns:
        The moment as it is now, or without one p (c, k) fp32; and q (c, k) fp32, or None.
    """
    shape = (layout.chunks, projection.sketch_size)
    out = into.moment if into is not None else gradient.new_empty(shape, dtype=torch.float32)
    square = gradient.new_empty(shape, dtype=torch.float32) if squares else None
    words = projection.words(layout.chunk, gradient.device)
    mode = 0 if into is None else 1 + into.averages
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
    lines = layout.chunks // layout.chunks_per_row
    with on_device_of(gradient):
        _encode[(triton.cdiv(lines, tile) * layout.chunks_per_row,)](
            gradient,
            factor,
            norm,
            a,
            b,
            words,
            out,
            square,
            lines,
            layout.numel,
            eps,
            beta,
            1 - beta,
            root_of(sketch_size) if sketch_size else 1.0,
            WHITEN=whitening is not None,
            CLIP_AT=CLIP,
            K=sketch_size,
            HELD=words.shape[1] if words is not None and sketch_size > 32 else 0,
            S=sparsity,
            SLOTS=slots,
            LENGTH=group_length(entries, slots),
            C=tile,
            PACKED=whitening is not None or (gradient.dtype is not torch.float32 and factor is None),
            ROWS_OF_A=power_of_two(sketch_size),
            ENTRIES=entries,
            MODE=mode,
            QUOTIENT="fast" if isinstance(_encode, triton.JITFunction) else "by reciprocal",
            num_warps=warps,
            enable_fp_fusion=False,  # w and ρE + p are rounded as torch rounds them
            **shape_of(layout),
        )


@triton.jit
def _whitened(
    gradient, factor, a, b, line, piece, entry, eps, numel,
    WHITEN: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr, QUOTIENT: tl.constexpr, WITHIN: tl.constexpr,
):  # fmt: skip
    """Load entries (C or 1, W) of the chunks that are the `piece`-th of lines (C, 1): w = g/(a·b + ε) in fp32.

    It is 0 on padding, where ε (C, 1) is infinite, and in rows that share a chunk and have a = 0. WITHIN: no entry is
    beyond N. Loads without a mask are shorter.
    """
    column = piece * N + entry
    at = line * (COLS if PIECES > 1 else N) + column
    if PADDED:
        there = (entry < N) & (column < COLS if PIECES > 1 else at < numel)
    else:
        there = entry < (entry.shape[1] if WITHIN else N)
    whole: tl.constexpr = WITHIN and not PADDED
    w = (tl.load(gradient + at) if whole else tl.load(gradient + at, mask=there, other=0.0)).to(tl.float32)
    if factor is not None:
        w *= tl.load(factor)
    if WHITEN:
        if ROWS > 1:
            row = line * ROWS + entry // COLS
            left = tl.load(a + row, mask=there, other=1.0)
            w = tl.where(left > 0, w, 0.0)
            left = tl.where(left > 0, left, 1.0)
            at = entry % COLS + line * 0
        else:
            left = tl.load(a + line)
            at = column + line * 0
        right = tl.load(b + at) if whole else tl.load(b + at, mask=there, other=1.0)
        if QUOTIENT == "exact":
            w = tl.div_rn(w, left * right + eps)
        elif QUOTIENT == "fast":
            root = tl.fma(left, right, eps)
            w *= tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [root], tl.float32, True, 1)
        else:
            w *= 1.0 / (left * right + eps)
    return w


@triton.jit
def _groups_of_largest(
    w, S: tl.constexpr, SLOTS: tl.constexpr, LENGTH: tl.constexpr, PACKED: tl.constexpr, FINITE: tl.constexpr
):
    """Entries (C, SLOTS·LENGTH) of the S groups of LENGTH entries of w (C, W) whose largest magnitudes are largest.

    An entry outside the S groups whose best entries come first has those S entries before it. Groups are ranges of
    entries, so of two groups with equal maxima the lower one holds the lower entry. Behind them, entries from W on.

    Also the largest key (C,) of the groups left out. PACKED: the low bits of a key give way to the group's number, so
    that one reduction finds both. Each round has four operations for every group, or six.
    """
    C: tl.constexpr = w.shape[0]
    GROUPS: tl.constexpr = w.shape[1] // LENGTH
    key = tl.abs(w) if FINITE else magnitude(w)  # the maximum of floats takes magnitudes at no cost, and ignores NaN
    key = tl.max(tl.reshape(key, (C, GROUPS, LENGTH)), 2).to(tl.int32, bitcast=True)
    group = tl.arange(0, GROUPS)[None, :]
    if PACKED:
        key = key & -GROUPS | (GROUPS - 1 - group)
    lane = tl.arange(0, SLOTS * LENGTH)[None, :]
    chosen = tl.zeros((C, SLOTS * LENGTH), tl.int32)
    for number in range(S):
        largest = tl.max(key, 1)[:, None]
        if PACKED:
            chosen = tl.where(lane // LENGTH == number, largest, chosen)
            key = tl.where(key == largest, TAKEN, key)
        else:
            first = tl.min(tl.where(key == largest, group, NO_TAG), 1)[:, None]
            chosen = tl.where(lane // LENGTH == number, first, chosen)
            key = tl.where(group == first, TAKEN, key)
    rest = tl.max(key, 1)
    if PACKED:
        chosen, rest = ~chosen & (GROUPS - 1), rest & -GROUPS
    entry = chosen * LENGTH + lane % LENGTH
    if S < SLOTS:
        entry = tl.where(lane < S * LENGTH, entry, GROUPS * LENGTH + lane)
    # not more candidates side by side in a lane than group maxima: else each round would move them between lanes
    EACH: tl.constexpr = max(1, min(SLOTS * LENGTH // 32, 8 // LENGTH))
    return tl.multiple_of(entry, (1, EACH)), rest


@triton.jit
def _chosen(
    gradient, factor, a, b, words, line, piece, eps, numel,
    WHITEN: tl.constexpr, CLIP_AT: tl.constexpr, K: tl.constexpr, HELD: tl.constexpr, S: tl.constexpr,
    SLOTS: tl.constexpr, LENGTH: tl.constexpr,
    ENTRIES: tl.constexpr, MODE: tl.constexpr, QUOTIENT: tl.constexpr, PACKED: tl.constexpr,
    SQUARES: tl.constexpr, ROWS_OF_A: tl.constexpr,
    N: tl.constexpr, COLS: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """√k·p and √k·q (C, ROWS_OF_A) of the top entries, in MODE 3 their index and value (C, SLOTS).

    Groups are chosen by w as QUOTIENT makes it, entries of those groups by the exact w. A round finds the largest
    magnitude, the lowest entry that has it with its sign, and marks it as taken: six operations for every candidate;
    then every lane adds the entry to its rows of the sketch, ten operations and six more for each 32 rows beyond.

    Also the smallest key (C,) of an entry chosen, and the largest of the groups left out.
    """
    C: tl.constexpr = line.shape[0]
    entry = tl.arange(0, ENTRIES)[None, :]
    w = _whitened(
        gradient, factor, a, b, line, piece, entry, eps, numel,
        WHITEN, N, COLS, PIECES, ROWS, PADDED, QUOTIENT, N == ENTRIES,
    )  # fmt: skip
    entry, rest = _groups_of_largest(w, S, SLOTS, LENGTH, PACKED, WHITEN)
    w = _whitened(
        gradient, factor, a, b, line, piece, entry, eps, numel,
        WHITEN, N, COLS, PIECES, ROWS, PADDED, "exact", N == ENTRIES and S == SLOTS,
    )  # fmt: skip
    key, tag = magnitude(w), tag_of(entry, w)
    row = tl.arange(0, SLOTS if MODE == 3 else ROWS_OF_A)[None, :]
    part = 0 if K <= 32 else (row if K == row.shape[1] else tl.minimum(row, K - 1)) // 32 * HELD
    x = tl.zeros((C, row.shape[1]), tl.int32 if MODE == 3 else tl.float32)
    y = tl.zeros((C, row.shape[1]), tl.float32)
    last = tl.zeros((C,), tl.int32)
    for number in range(S):
        last = tl.max(key, 1)
        first = tl.min(tl.where(key == last[:, None], tag, NO_TAG), 1)
        key = tl.where(tag == first[:, None], TAKEN, key)
        size = last.to(tl.float32, bitcast=True)
        if WHITEN:
            size = tl.minimum(size, CLIP_AT)
        value = (size.to(tl.int32, bitcast=True) + (first << 31)).to(tl.float32, bitcast=True)
        if MODE == 3:
            x = tl.where(row == number, (first >> 1)[:, None], x)
            y = tl.where(row == number, value[:, None], y)
        else:
            word = tl.load(words + part + (first >> 1)[:, None])
            x += flipped(value[:, None], word, row)
            if SQUARES:
                y += flipped((size * size)[:, None], word, row)
    return x, y, last, rest


@triton.jit(do_not_specialize=["norm", "lines", "numel", "eps", "beta", "weight", "root"])
def _encode(
    gradient, factor, norm, a, b, words, out, square, lines, numel, eps, beta, weight, root,
    WHITEN: tl.constexpr, CLIP_AT: tl.constexpr, K: tl.constexpr, HELD: tl.constexpr, S: tl.constexpr,
    SLOTS: tl.constexpr, LENGTH: tl.constexpr,
    C: tl.constexpr, ENTRIES: tl.constexpr, MODE: tl.constexpr, QUOTIENT: tl.constexpr,
    PACKED: tl.constexpr, ROWS_OF_A: tl.constexpr,
    N: tl.constexpr, COLS: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """p = A·top_s(w), and what becomes of it: MODE 0 p, 1 E ← ρE + p, 2 M ← M + (1 − β1)(p − M), 3 index and value.

    A tile is C chunks that lie below each other, so that they share b; nothing in it goes through shared memory.

    Bytes: the gradient once, the sketch written once and in modes 1 and 2 read once (4·k/n of fp32 each), a and b from
    the cache. Operations for each entry of a chunk: 6 to whiten and for its group's maximum, and for the s rounds
    10·s·√(s/n) over group maxima and candidates and s·(4 + k/5)·32/n to project: with what a tile costs in itself, 27
    at n = 256, s = 4, k = 32.
    """
    piece = tl.program_id(0) % PIECES
    line = tl.program_id(0) // PIECES * C + tl.arange(0, C)[:, None]
    here = line < lines
    line = tl.minimum(line, lines - 1).to(tl.int64)
    if WHITEN and ROWS == 1:
        eps = tl.where(tl.load(a + line) > 0, eps, float("inf"))
    x, y, last, rest = _chosen(
        gradient, factor, a, b, words, line, piece, eps, numel,
        WHITEN, CLIP_AT, K, HELD, S, SLOTS, LENGTH, ENTRIES, MODE, QUOTIENT, PACKED, square is not None, ROWS_OF_A,
        N, COLS, PIECES, ROWS, PADDED,
    )  # fmt: skip
    if WHITEN:
        # an entry left out is at most SLACK larger than it was thought to be, and the low bits that its key lacks; in
        # one chunk of some thousand that is too close
        unsure = (rest + (ENTRIES // LENGTH + SLACK) >= last) & ((rest | last) > 0)
        if tl.max(unsure.to(tl.int32), 0) > 0:
            x, y, last, rest = _chosen(
                gradient, factor, a, b, words, line, piece, eps, numel,
                WHITEN, CLIP_AT, K, HELD, S, SLOTS, LENGTH, ENTRIES, MODE, "exact", False, square is not None,
                ROWS_OF_A, N, COLS, PIECES, ROWS, PADDED,
            )  # fmt: skip
    if norm is not None:
        moves = (tl.load(norm) > 0) & (tl.load(norm) < float("inf"))
        if MODE == 3:
            y = tl.where(moves, y, 0.0)
        else:
            x = tl.where(moves, x, 0.0)
        beta = tl.where(moves, beta, 1.0)
    chunk = line * PIECES + piece
    if MODE == 3:
        slot = tl.arange(0, SLOTS)
        before = (x[:, None, :] < x[:, :, None]) & (slot < S)[None, None, :]
        place = chunk * S + tl.sum(before.to(tl.int32), 2)
        real = here & (slot < S)[None, :]
        tl.store(out + place, x.to(tl.int64), mask=real)
        tl.store(square + place, y, mask=real)
    else:
        row = tl.arange(0, ROWS_OF_A)[None, :]
        at = tl.multiple_of(chunk * K + row, (1, 1))
        real = here & (row < K) if K < ROWS_OF_A else here
        p = x * root
        if MODE != 0:
            held = tl.load(out + at, mask=row < K, other=0.0) if K < ROWS_OF_A else tl.load(out + at)
            p = held * beta + p if MODE == 1 else held + weight * (p - held)
        tl.store(out + at, p, mask=real)
        if square is not None:
            tl.store(square + at, y * root, mask=real)

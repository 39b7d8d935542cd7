"""The fused recovery by thresholding. The twin is `sgc.codec.recover.recover` with "threshold"."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgc.backends.triton.chunks import (
    NO_TAG,
    OUTSIDE,
    PADDING,
    TAKEN,
    flipped,
    group_length,
    is_real,
    magnitude,
    on_device_of,
    popcount,
    power_of_two,
    root_of,
    shape_of,
    signed,
    tag_of,
)
from sgc.constants import RIDGE

if TYPE_CHECKING:
    from sgc.codec.layout import Layout
    from sgc.codec.project import Projection

MOST_ENTRIES = 2048  # of a chunk: the correlations of 16 chunks are held in registers
MOST_RECOVERED = 32  # the Gram matrices are held there, too
TILE = 1 << 14  # correlations that a program holds, and entries of its Gram matrices
WARPS = 8


def obstacle(layout: Layout, projection: Projection, recovered: int, method: str) -> str | None:
    """Return why the kernel can't recover such chunks, or None."""
    if method != "threshold":
        return f'recovery="{method}" goes over A several times'
    if projection.sketch_size >= layout.chunk:
        return f"sketch_size={projection.sketch_size} is no less than the {layout.chunk} entries of a chunk"
    if layout.chunk > MOST_ENTRIES:
        return f"a chunk has {layout.chunk} entries, more than {MOST_ENTRIES}"
    if recovered > min(MOST_RECOVERED, layout.chunk):
        return f"recovered={recovered} is more than {min(MOST_RECOVERED, layout.chunk)}"
    return None


def recover(
    sketch: Tensor,
    layout: Layout,
    projection: Projection,
    recovered: int,
    *,
    take: bool = False,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Recover y ≈ A[:, index]·value by one pass over A and least squares, and with `take` remove it: y ← y − A·x̂.

    Correlations are as accurate as fp32's: y is split into three bf16 numbers, which hold all 24 bits, the signs are
    exact in bf16, and the tensor cores add in fp32. So the entries chosen are those of the largest |Aᵀy|, up to sums of
    k terms added in another order; of equal ones any.

    Args:
        sketch: y, (c, k) fp32 contiguous; changed in place with `take`.
        layout: the chunks.
        projection: A.
        recovered: s'.
        take: whether what is recovered leaves the sketch.
        norm: of the gradient, () fp32: unless it is finite and above 0, all values are 0.

    Returns:
        index (c, s') int64, ascending in each chunk, and value (c, s') fp32, 0 on padding.
    """
    index = sketch.new_empty((layout.chunks, recovered), dtype=torch.int64)
    value = sketch.new_empty((layout.chunks, recovered))
    if not layout.chunks:
        return index, value
    entries, slots = max(16, power_of_two(layout.chunk)), power_of_two(recovered)
    tile = min(128, max(16, min(TILE // entries, TILE // slots**2)))
    length = group_length(entries, slots)
    words = projection.words(layout.chunk, sketch.device)
    with on_device_of(sketch):
        _recover[(triton.cdiv(layout.chunks, tile),)](
            sketch,
            words,
            norm,
            index,
            value,
            layout.chunks,
            layout.numel,
            root_of(projection.sketch_size),
            RIDGE,
            words.shape[1],
            K=projection.sketch_size,
            S=recovered,
            SLOTS=slots,
            LENGTH=length,
            C=tile,
            ENTRIES=entries,
            LANES=min(32 * WARPS // tile, entries // length, slots * length),
            TAKE=take,
            # the interpreter multiplies the bits of bf16 numbers, so there the three parts are multiplied in fp32
            DOT=tl.bfloat16 if isinstance(_recover, triton.JITFunction) else tl.float32,
            num_warps=WARPS,
            enable_fp_fusion=True,
            **shape_of(layout),
        )
    return index, value


@triton.jit
def _at(x, at, SIZE: tl.constexpr, P: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr):
    """Elements of x, which has SIZE of them, at flat positions (P, C, LANES).

    A gather of rank 1 goes through shared memory; one of rank 2 would shuffle every element for every position.
    """
    return tl.reshape(tl.gather(tl.reshape(x, (SIZE,)), tl.reshape(at, (P * C * LANES,)), 0), (P, C, LANES))


@triton.jit
def _take_largest(key, tag):
    """Of every chunk of keys (P, C, LANES) the largest and its tag (C,), of equal keys the lowest, and the keys left.

    Six operations for every element: P of them are a lane's own, and LANES lanes next to each other share a chunk.
    """
    largest = tl.max(tl.max(key, 0), 1)
    first = tl.min(tl.min(tl.where(key == largest[None, :, None], tag, NO_TAG), 0), 1)
    return largest, first, tl.where(tag == first[None, :, None], TAKEN, key)


@triton.jit(do_not_specialize=["norm", "chunks", "numel", "root", "ridge", "held"])
def _recover(
    sketch, words, norm, index_out, value_out, chunks, numel, root, ridge, held,
    K: tl.constexpr, S: tl.constexpr, SLOTS: tl.constexpr, LENGTH: tl.constexpr, C: tl.constexpr,
    ENTRIES: tl.constexpr, LANES: tl.constexpr, TAKE: tl.constexpr, DOT: tl.constexpr,
    N: tl.constexpr, COLS: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """index, value = the s' of largest |Aᵀy|, by least squares; TAKE: y ← y − A·x̂.

    LANES lanes work for a chunk, each with as many of its groups, its candidates and, to solve, its rows of the Gram
    matrix; correlations go to the candidates' lanes through shared memory, 4 bytes for each entry of the tile.

    Bytes: y read once (with TAKE also written; its second read is from the cache), 12·s'/n for each entry of a chunk
    written. Operations for each entry of a chunk: 3·k multiply-adds on the tensor cores, 3·k/C to unpack signs, 2 for
    its group's maximum and to store it, for the rounds 12·s'·√(s'/n), to solve and to subtract A·x̂ s'·(7·s' + 3·k)/n:
    with what a tile costs in itself, 20 at n = 256, s' = 4, k = 32, and 90 at n = 1024, s' = 16, k = 128.
    """
    WHOLE: tl.constexpr = not PADDED and N == ENTRIES
    chunk = tl.program_id(0).to(tl.int64) * C + tl.arange(0, C)
    there = tl.minimum(chunk, chunks - 1)[:, None]
    entry = tl.arange(0, ENTRIES)[None, :]
    bit = tl.arange(0, 32)
    order = bit // 2 + bit % 2 * 16  # as two signs at a time come from a word
    score = tl.zeros((C, ENTRIES), tl.float32)
    for number in range((K + 31) // 32):
        row = number * 32 + order[None, :]
        if K % 32:
            y = tl.load(sketch + there * K + row, mask=row < K, other=0.0)
        else:
            y = tl.load(sketch + there * K + row)
        high = y.to(tl.bfloat16)
        y -= high.to(tl.float32)
        middle = y.to(tl.bfloat16)
        low = (y - middle.to(tl.float32)).to(tl.bfloat16)
        if N == ENTRIES:
            word = tl.load(words + number * held + entry.trans())
        else:
            word = tl.load(words + number * held + entry.trans(), mask=entry.trans() < N, other=0)
        pair = (word << (15 - tl.arange(0, 16)[None, :])) & -0x7FFF8000 ^ -0x407F4080
        sign = tl.reshape(tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16)), (ENTRIES, 32))
        sign = sign.to(tl.bfloat16, bitcast=True).to(DOT)
        for _ in range(3):  # a loop, as of products one after the other Triton gives the last another layout
            score = tl.dot(low.to(DOT), sign.trans(), score)
            low, middle, high = middle, high, low

    # the support: groups of every APART-th entry, of each half where a warp holds one, so that a thread finds their
    # maxima among its own
    GROUPS: tl.constexpr = ENTRIES // LENGTH
    HALVES: tl.constexpr = 2 if C == 64 else 1
    APART: tl.constexpr = GROUPS // HALVES
    size = tl.abs(score)
    if not WHOLE:
        inside = is_real(chunk[:, None], entry, chunks, numel, N, COLS, PIECES, PADDED)
        size = tl.where(inside, size, tl.where(entry < N, PADDING, OUTSIDE).to(tl.float32))
    best = tl.max(tl.reshape(size, (C, HALVES, LENGTH, APART)), 2)
    key = best.to(tl.int32, bitcast=True)
    if not WHOLE:
        key = tl.where(best < 0, best.to(tl.int32), key)
    line = tl.arange(0, C)[None, :, None]
    lane = tl.arange(0, LANES)[None, None, :]
    group = tl.arange(0, GROUPS // LANES)[:, None, None] * LANES + lane
    key = _at(key, line * GROUPS + group, C * GROUPS, GROUPS // LANES, C, LANES)
    P: tl.constexpr = SLOTS * LENGTH // LANES
    candidate = tl.arange(0, P)[:, None, None] * LANES + lane
    chosen = tl.zeros((P, C, LANES), tl.int32)
    for number in range(S):
        _, first, key = _take_largest(key, group)
        chosen = tl.where(candidate // LENGTH == number, first[None, :, None], chosen)
    member = chosen // APART * (ENTRIES // HALVES) + candidate % LENGTH * APART + chosen % APART
    # blocks of 8 by 8, as a warp holds them, are stored without bank conflicts
    blocks = tl.permute(tl.reshape(score, (C // 8, 8, ENTRIES // 8, 8)), (0, 2, 1, 3))
    at = (line // 8 * (ENTRIES // 8) + member // 8) * 64 + line % 8 * 8 + member % 8
    few = _at(blocks, at, C * ENTRIES, P, C, LANES)
    key, tag = magnitude(few), tag_of(member, few)
    if not WHOLE:
        inside = is_real(chunk[None, :, None], member, chunks, numel, N, COLS, PIECES, PADDED)
        key = tl.where(inside, key, tl.where(member < N, PADDING, OUTSIDE))
    if S < SLOTS:
        key = tl.where(candidate < S * LENGTH, key, TAKEN)
    slot = tl.arange(0, SLOTS)[None, :]
    best = tl.full((C, SLOTS), TAKEN, tl.int32)
    tags = tl.zeros((C, SLOTS), tl.int32)
    for number in range(S):
        largest, first, key = _take_largest(key, tag)
        best = tl.where(slot == number, largest[:, None], best)
        tags = tl.where(slot == number, first[:, None], tags)
    index = tags >> 1
    real = best >= 0
    right = tl.where(real, signed(best, tags) * root, 0.0)
    other = tl.arange(0, SLOTS)[:, None, None]
    others = tl.permute(index, (1, 0))[:, :, None]

    if S > 1:
        # Gauss-Jordan elimination on Gram matrices (SLOTS, C, SLOTS), symmetric and positive with the ridge, of which
        # what is still to be eliminated stays symmetric
        apart = tl.zeros((SLOTS, C, SLOTS), tl.int32)
        for number in range((K + 31) // 32):
            word = tl.load(words + number * held + index, mask=real, other=0)
            apart += popcount(word[None, :, :] ^ tl.permute(word, (1, 0))[:, :, None])
        gram = 1.0 - apart.to(tl.float32) * (2.0 * root * root)
        if not WHOLE or S < SLOTS:
            gram = tl.where(real[None, :, :] & tl.permute(real, (1, 0))[:, :, None], gram, 0.0)
        gram = tl.where(other == slot[None, :, :], 1.0 + ridge, gram)
        pivots = tl.full((C, SLOTS), 1.0, tl.float32)
        for number in range(S):
            here = slot == number
            column = tl.sum(tl.where(other == number, gram, 0.0), 0)
            pivot = tl.sum(tl.where(here, column, 0.0), 1)[:, None]
            value = tl.sum(tl.where(here, right, 0.0), 1)[:, None]
            factor = tl.where(here, 0.0, column / pivot)
            gram -= factor[None, :, :] * tl.permute(column, (1, 0))[:, :, None]
            right -= factor * value
            pivots = tl.where(here, pivot, pivots)
        right = right / pivots

    if norm is not None:
        right = tl.where((tl.load(norm) > 0) & (tl.load(norm) < float("inf")), right, 0.0)
    before = (others < index[None, :, :]) & (other < S)
    place = chunk[:, None] * S + tl.sum(before.to(tl.int32), 0)
    here = (chunk < chunks)[:, None] & (slot < S)
    tl.store(index_out + place, index.to(tl.int64), mask=here)
    tl.store(value_out + place, right, mask=here)

    if TAKE:
        tl.debug_barrier()  # all of y has been read
        taken_value = tl.permute(right * root, (1, 0))[:, :, None]
        for number in range((K + 31) // 32):
            row = number * 32 + bit[None, :]
            kept = (chunk < chunks)[:, None] & (row < K)
            drawn = tl.load(words + number * held + index, mask=real, other=0)
            taken = tl.sum(flipped(taken_value, tl.permute(drawn, (1, 0))[:, :, None], row[None, :, :]), 0)
            from_here = sketch + chunk[:, None] * K + row
            tl.store(from_here, tl.load(from_here, mask=kept) - taken, mask=kept)

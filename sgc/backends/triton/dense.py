"""The default path fused: row and column means of g² in one read, then W ← (1 − decay)·W − lr·w in another.

The twins are `sgc.step.square_sums`, `sgc.step.apply_memoryless` and, for tensors kept dense, `sgc.step.adamw_update`
with `sgc.step.apply_dense`. One launch serves many tensors: a table in device memory holds a column of 8-byte words for
each (addresses, sizes, rates), and a program finds its tensor by its number. Nothing that changes from step to step is
an argument of a kernel, so nothing is compiled anew. No atomics: sums of a tensor are added in the same order every
time, so equal gradients make equal bits. For a tensor of d entries of b bytes and a weight of b' bytes:

| kernel | formula | bytes moved |
|---|---|---|
| `tile_sums` | Σⱼ gᵢⱼ², Σᵢ gᵢⱼ² of every tile | b·d read, d/22 written |
| `fold_sums` | the sums of the tiles of a row, a column; Σ of R and C as they will be | d/22 read |
| `move_moments` | ‖g‖; R ← EMA, C ← EMA; a, b | 4 times 4·(rows + cols) |
| `whiten_and_apply` | W ← (1 − decay)·W − lr·clip(g/(aᵢ·bⱼ + ε)) | b·d + b'·d read, b'·d written |
| `dense_sums` | Σ g² of blocks | b·d read |
| `dense_adamw` | ‖g‖; m, v ← EMA; W ← (1 − decay)·W − lr·m̂/(√v̂ + ε) | (b + b' + 8)·d read, (b' + 8)·d written |

Whether a gradient is finite, and not all zero, is decided on the device: `move_moments` and what follows leave alone
what must not move, and ‖g‖ is noted for the host to read later.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgc import constants
from sgc.backends.triton.chunks import on_device_of

if TYPE_CHECKING:
    from sgc.codec.layout import Layout

CLIP = tl.constexpr(constants.CLIP)
FLOOR = tl.constexpr(constants.FLOOR)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
TILE = 1 << 15  # entries of a tile, which leave one sum for each of its rows and columns: 1/85 of the entries
SMALL_TILE = 1 << 13  # where such large ones would leave most of a GPU idle
SMALL_WAVE = 1 << 26  # entries that are few
SUMMED = 1024  # entries that the one warp of `tile_sums` loads at a time, 4 loads of 16 bytes a thread in bf16
MOVED = 2048  # entries that the four warps of `whiten_and_apply` load at a time
FOLDED = tl.constexpr(128)  # rows, or columns, that a program of `fold_sums` and `move_moments` finishes
FOLD = tl.constexpr(32)  # partial sums of each that it loads at a time
TOTALS = tl.constexpr(256)  # sums of programs that are loaded at a time
BLOCK = tl.constexpr(1024)  # entries of a program for a tensor kept dense
# fusion is said, since its default changes between versions of Triton
ONE_WARP = {"num_warps": 1, "enable_fp_fusion": True}
FOUR_WARPS = {"num_warps": 4, "enable_fp_fusion": True}

# Words of the table: what changes with every step comes first.
GRADIENT = tl.constexpr(0)  # address
BASE = tl.constexpr(1)  # updates the host thinks were made before this one, and those it has learnt were none
SEED = tl.constexpr(2)  # of stochastic rounding, 32 bits
LR = tl.constexpr(3)  # learning rate times scale, negative to maximize; this and all rates below: bits of a float64
KEEP = tl.constexpr(4)  # 1 − decay
EPS = tl.constexpr(5)
BETA1 = tl.constexpr(6)
BETA2 = tl.constexpr(7)
LOG_BETA1 = tl.constexpr(8)
LOG_BETA2 = tl.constexpr(9)
WEIGHT = tl.constexpr(10)  # address
FIRST = tl.constexpr(11)  # address of R (rows,), or of the first moment; fp32
SECOND = tl.constexpr(12)  # address of C (cols,), or of the second moment; fp32
ROWS = tl.constexpr(13)  # of the grid
COLS = tl.constexpr(14)
NUMEL = tl.constexpr(15)
SLOT = tl.constexpr(16)  # where its count of updates that were none is
TILE_AT = tl.constexpr(17)  # number of the first program of its tiles, or blocks
FOLD_AT = tl.constexpr(18)  # number of the first program that folds its sums
ROW_AT = tl.constexpr(19)  # in the scratch: sums of tiles (⌈cols / BN⌉, rows)
COL_AT = tl.constexpr(20)  # in the scratch: sums of tiles (⌈rows / BR⌉, cols)
SUMS_AT = tl.constexpr(21)  # in the scratch: row sums (rows,), column sums (cols,), and then a and b
WORDS = 22
RATES = 10  # words up to here are filled anew at every step


@triton.jit
def mixed(x):
    """The hash `sgc.codec.project.mix` of uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_of(row_key, col_key):
    """16 random bits of an entry, from the hashes of its row (with the seed) and of its column: the hash's second half.

    The first half scrambles what the keys have been scrambled for already.
    """
    x = row_key ^ col_key
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x >> 16


@triton.jit
def read(address, at, mask, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Load fp32 from an address in the table; a bf16 is the upper half of an fp32."""
    if DTYPE == tl.bfloat16:
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    x = tl.load(pointer + at, mask=mask, other=0)
    if DTYPE == tl.bfloat16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def write(address, at, x, mask, noise, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr):
    """Store fp32 in the dtype of the weights: to nearest, or bf16 up or down at random, by noise below 2¹⁶."""
    if DTYPE == tl.bfloat16:
        pointer = address.to(tl.pointer_type(tl.uint16))
    else:
        pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        if STOCHASTIC:
            upper = (bits + noise) >> 16
        else:
            upper = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        tl.store(pointer + at, upper.to(tl.uint16), mask=mask)
    else:
        tl.store(pointer + at, x.to(DTYPE), mask=mask)


@triton.jit
def word(table, tensors, number, WHICH: tl.constexpr):
    """An integer of a tensor's column."""
    return tl.load(table + WHICH * tensors + number)


@triton.jit
def rate(table, tensors, number, WHICH: tl.constexpr):
    """A float64 of a tensor's column."""
    return tl.load(table + WHICH * tensors + number).to(tl.float64, bitcast=True)


@triton.jit
def eights(size, ALIGNED: tl.constexpr):
    """A multiple of 8 in a form in which the compiler sees it: Triton 3.6 forgets a mark on what a function returns."""
    return size // 8 * 8 if ALIGNED else size


@triton.jit
def correction(log_beta, count):
    """1 − βᵗ, in float64: at t = 1 an fp32 would lose four digits."""
    return (1.0 - tl.exp(log_beta * count.to(tl.float64))).to(tl.float32)


@triton.jit
def sum_tile(
    gradient, rows, cols, numel, local, row_part, col_part, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Row and column sums of g² of tile `local` of a grid: BM·STEPS rows, BN columns."""
    cols, numel = eights(cols, ALIGNED), eights(numel, ALIGNED)
    wide = tl.cdiv(cols, BN)
    across, down = local % wide, local // wide
    col = across * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(STEPS):
        row = (down * STEPS + step) * BM + tl.arange(0, BM)
        at = row[:, None] * cols + col[None, :]
        inside = (col < cols)[None, :] & (at < numel)
        x = read(gradient, at, inside, DTYPE, ALIGNED)
        square = x * x
        total += square
        tl.store(row_part + across * rows + row, tl.sum(square, 1), mask=row < rows)
    tl.store(col_part + down * cols + col, tl.sum(total, 0), mask=col < cols)


@triton.jit
def fold(part, count, size, at):
    """Sums (FOLDED,) of `count` partial sums of `size` entries each, of the entries `at`."""
    total = tl.zeros((FOLD, FOLDED), tl.float32)
    for start in range(0, count, FOLD):
        number = start + tl.arange(0, FOLD)
        inside = (number < count)[:, None] & (at < size)[None, :]
        total += tl.load(part + number[:, None].to(tl.int64) * size + at[None, :], mask=inside, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["tensors"])
def tile_sums(
    table, owner, parts, tensors,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Row and column sums of g² of every tile of many tensors, in one read of their gradients.

    Args: table (WORDS, tensors) int64; owner (programs,) int32, the tensor of each; parts fp32, where ROW_AT and COL_AT
    point to.
    """
    program = tl.program_id(0)
    number = tl.load(owner + program)
    rows, cols = word(table, tensors, number, ROWS), word(table, tensors, number, COLS)
    local = program - word(table, tensors, number, TILE_AT)
    row_part = parts + word(table, tensors, number, ROW_AT)
    col_part = parts + word(table, tensors, number, COL_AT)
    gradient, numel = word(table, tensors, number, GRADIENT), word(table, tensors, number, NUMEL)
    sum_tile(gradient, rows, cols, numel, local, row_part, col_part, DTYPE, ALIGNED, BM, BN, STEPS)


@triton.jit
def means(total, at, size, across, numel, is_row):
    """Turn sums over rows (over columns) into means, padding left out: a vector's last grid row ends early.

    Args: at, among `size` rows (cols); across: cols (rows), the entries of a sum.
    """
    ragged = size * across - numel
    ended = tl.where(is_row, at == size - 1, (at >= size - ragged) & (across > 1))
    real = across - tl.where(ended, tl.where(is_row, ragged, 1), 0)
    return total / real.to(tl.float32)


@triton.jit
def locate(table, owner, tensors, program):
    """Find what a program of `fold_sums` and `move_moments` finishes: rows, or columns, of a tensor.

    Returns the tensor, the program's number among its own, whether it has rows, how many rows (cols) there are, how
    many entries each has, and which of them are the program's.
    """
    number = tl.load(owner + program)
    rows, cols = word(table, tensors, number, ROWS), word(table, tensors, number, COLS)
    local = program - word(table, tensors, number, FOLD_AT)
    blocks = tl.cdiv(rows, FOLDED)
    is_row = local < blocks
    block = tl.where(is_row, local, local - blocks)
    at = block * FOLDED + tl.arange(0, FOLDED)
    return number, local, is_row, tl.where(is_row, rows, cols), tl.where(is_row, cols, rows), at


@triton.jit
def moved(table, tensors, number, is_row, total, at, size, across):
    """The address of R (of C), and its entries as they will be: R + (1 − β2)(mean − R)."""
    mean = means(total, at, size, across, word(table, tensors, number, NUMEL), is_row)
    address = tl.where(is_row, word(table, tensors, number, FIRST), word(table, tensors, number, SECOND))
    pointer = address.to(tl.pointer_type(tl.float32)) + at
    held = tl.load(pointer, mask=at < size, other=0.0)
    return pointer, held + (1 - rate(table, tensors, number, BETA2)).to(tl.float32) * (mean - held)


@triton.jit(do_not_specialize=["tensors"])
def fold_sums(table, owner, parts, totals, tensors, BN: tl.constexpr, BR: tl.constexpr):
    """Add up what the tiles of each row and column have summed, and what all rows have; R and C as they will be, too.

    Args: table, parts as in `tile_sums`; owner (programs,) int32; totals (programs, 2) fp32: Σg² of the program's rows,
    and the sum of its part of R or C after this update.
    """
    program = tl.program_id(0)
    number, _, is_row, size, across, at = locate(table, owner, tensors, program)
    part = parts + tl.where(is_row, word(table, tensors, number, ROW_AT), word(table, tensors, number, COL_AT))
    count = tl.where(is_row, tl.cdiv(across, BN), tl.cdiv(across, BR))
    total = fold(part, count, size, at)
    inside = at < size
    sums = parts + word(table, tensors, number, SUMS_AT) + tl.where(is_row, 0, across)
    tl.store(sums + at, total, mask=inside)
    _, new = moved(table, tensors, number, is_row, total, at, size, across)
    tl.store(totals + 2 * program, tl.sum(tl.where(at < tl.where(is_row, size, 0), total, 0.0), 0))
    tl.store(totals + 2 * program + 1, tl.sum(tl.where(inside, new, 0.0), 0))


@triton.jit
def sum_of(totals, first, count, STRIDE: tl.constexpr):
    """The sum of `count` of the totals, in the same order for every program."""
    total = tl.zeros((TOTALS,), tl.float32)
    for start in range(0, count, TOTALS):
        at = start + tl.arange(0, TOTALS)
        total += tl.load(totals + (first + at) * STRIDE, mask=at < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def count_of(table, tensors, number, missed, norm):
    """Updates made, with this one where it moves; whether it moves; and the slot and count of those that did not."""
    slot = word(table, tensors, number, SLOT)
    none = tl.load(missed + slot)
    moves = (norm > 0) & (norm < float("inf"))
    return word(table, tensors, number, BASE) - none + 1, moves, none + 1 - moves.to(tl.int32)


@triton.jit(do_not_specialize=["tensors"])
def move_moments(table, owner, parts, totals, missed, norms, missed_now, tensors):
    """R ← EMA, C ← EMA of the means of g²; a, b of √v̂ᵢⱼ = aᵢ·bⱼ as `sgc.moments.factor`, a = 0 in a row of zeros.

    Args: table, owner, parts, totals as in `fold_sums`; missed (slots,) int32, calls that were no updates; norms
    (tensors,) fp32, ‖g‖ is stored; missed_now (tensors,) int32: `missed` after this call.
    """
    program = tl.program_id(0)
    number, local, is_row, size, across, at = locate(table, owner, tensors, program)
    rows, cols = tl.where(is_row, size, across), tl.where(is_row, across, size)
    first, row_blocks, col_blocks = program - local, tl.cdiv(rows, FOLDED), tl.cdiv(cols, FOLDED)
    norm = tl.sqrt_rn(sum_of(totals, first, row_blocks, 2))
    count, moves, none = count_of(table, tensors, number, missed, norm)
    if local == 0:
        tl.store(norms + number, norm)
        tl.store(missed_now + number, none)

    sums = parts + word(table, tensors, number, SUMS_AT) + tl.where(is_row, 0, across) + at
    inside = at < size
    total = tl.load(sums, mask=inside, other=0.0)
    pointer, new = moved(table, tensors, number, is_row, total, at, size, across)
    tl.store(pointer, new, mask=at < tl.where(moves, size, 0))
    corrected = correction(rate(table, tensors, number, LOG_BETA2), count)
    blocks = tl.where(is_row, row_blocks, col_blocks)
    of_new = sum_of(totals + 1, tl.where(is_row, first, first + row_blocks), blocks, 2)
    mean = tl.where(moves, of_new / size.to(tl.float32), 0.0) / corrected
    mean = tl.where(is_row, tl.maximum(mean, TINY), mean)
    hat = tl.maximum(tl.where(moves, new, 0.0) / corrected, FLOOR * mean)
    root = tl.sqrt_rn(hat / tl.where(is_row, mean, 1.0))
    tl.store(sums, tl.where(is_row & (total == 0), 0.0, root), mask=inside)


@triton.jit
def move_tile(
    gradient, weight, rows_at, cols_at, rows, cols, first, last, local, moves, keep, lr, eps, seed, decays,
    DTYPE: tl.constexpr, WEIGHTS: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, FROM_0: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """W ← (1 − decay)·W − lr·clip(g / (aᵢ·bⱼ + ε)) in tile `local` of a grid, whose entries first to last are W's.

    Args: rows_at and cols_at point to a and b; a is 0 in a row without gradient. Without `moves`, W only decays.
    """
    cols, first, last = eights(cols, ALIGNED), eights(first, ALIGNED), eights(last, ALIGNED)
    wide = tl.cdiv(cols, BN)
    across, down = local % wide, local // wide
    col = across * BN + tl.arange(0, BN)
    b = tl.load(cols_at + col, mask=col < tl.where(moves, cols, 0), other=1.0)
    col_key = mixed(col.to(tl.uint32))
    for step in range(tl.where(moves | decays, STEPS, 0)):
        row = (down * STEPS + step) * BM + tl.arange(0, BM)
        a = tl.load(rows_at + row, mask=row < tl.where(moves, rows, 0), other=0.0)
        busy = a > 0
        at = row[:, None] * cols + col[None, :]
        inside = (col < cols)[None, :] & (at < last)
        if not FROM_0:
            inside &= at >= first
        touched = inside & (a > tl.where(decays, -1.0, 0.0))[:, None]
        x = read(gradient, at, inside & busy[:, None], DTYPE, ALIGNED)
        place = at if FROM_0 else at - first
        w = read(weight, place, touched, WEIGHTS, ALIGNED)
        u = x / (tl.where(busy, a, 1.0)[:, None] * b[None, :] + eps)
        u = tl.minimum(tl.maximum(u, -CLIP), CLIP)
        noise = noise_of(mixed(row.to(tl.uint32) ^ seed)[:, None], col_key[None, :])
        write(weight, place, w * keep - lr * u, touched, noise, WEIGHTS, ALIGNED, STOCHASTIC)


@triton.jit(do_not_specialize=["tensors"])
def whiten_and_apply(
    table, owner, parts, norms, tensors,
    DTYPE: tl.constexpr, WEIGHTS: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """W ← (1 − decay)·W − lr·clip(g / (aᵢ·bⱼ + ε)) for many tensors; a row without gradient is decayed, or not read.

    Args: table, owner, norms as above; parts, where SUMS_AT points to a and b. A norm that is not finite leaves W
    alone, a norm of 0 decays it.
    """
    program = tl.program_id(0)
    number = tl.load(owner + program)
    rows, cols = word(table, tensors, number, ROWS), word(table, tensors, number, COLS)
    local = program - word(table, tensors, number, TILE_AT)
    norm = tl.load(norms + number)
    moves = (norm > 0) & (norm < float("inf"))
    keep = rate(table, tensors, number, KEEP).to(tl.float32)
    decays = (keep != 1.0) & (norm < float("inf"))
    factors = parts + word(table, tensors, number, SUMS_AT)
    move_tile(
        word(table, tensors, number, GRADIENT), word(table, tensors, number, WEIGHT), factors, factors + rows,
        rows, cols, 0, word(table, tensors, number, NUMEL), local, moves, keep,
        rate(table, tensors, number, LR).to(tl.float32), rate(table, tensors, number, EPS).to(tl.float32),
        word(table, tensors, number, SEED).to(tl.uint32), decays,
        DTYPE, WEIGHTS, STOCHASTIC, ALIGNED, True, BM, BN, STEPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tensors"])
def dense_sums(table, owner, totals, tensors, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Σ g² of every block of many tensors.

    Args: table, owner as in `tile_sums`; totals (programs, 2) fp32, the first column is stored.
    """
    program = tl.program_id(0)
    number = tl.load(owner + program)
    numel = eights(word(table, tensors, number, NUMEL), ALIGNED)
    at = (program - word(table, tensors, number, TILE_AT)) * BLOCK + tl.arange(0, BLOCK)
    x = read(word(table, tensors, number, GRADIENT), at, at < numel, DTYPE, ALIGNED)
    tl.store(totals + 2 * program, tl.sum(x * x, 0))


@triton.jit(do_not_specialize=["tensors"])
def dense_adamw(
    table, owner, totals, missed, norms, missed_now, tensors,
    DTYPE: tl.constexpr, WEIGHTS: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """AdamW in fp32 on many tensors: m, v ← EMA, W ← (1 − decay)·W − lr·m̂/(√v̂ + ε), after `dense_sums`.

    Args: as in `move_moments` and `dense_sums`.
    """
    program = tl.program_id(0)
    number = tl.load(owner + program)
    numel = eights(word(table, tensors, number, NUMEL), ALIGNED)
    first = word(table, tensors, number, TILE_AT)
    local = program - first
    norm = tl.sqrt_rn(sum_of(totals, first, tl.cdiv(numel, BLOCK), 2))
    count, moves, none = count_of(table, tensors, number, missed, norm)
    if local == 0:
        tl.store(norms + number, norm)
        tl.store(missed_now + number, none)

    keep = rate(table, tensors, number, KEEP).to(tl.float32)
    decays = (keep != 1.0) & (norm < float("inf"))
    at = local * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.where(moves, numel, 0)
    x = read(word(table, tensors, number, GRADIENT), at, inside, DTYPE, ALIGNED)
    m_at, v_at = word(table, tensors, number, FIRST), word(table, tensors, number, SECOND)
    m = read(m_at, at, inside, tl.float32, ALIGNED)
    v = read(v_at, at, inside, tl.float32, ALIGNED)
    beta1, beta2 = rate(table, tensors, number, BETA1), rate(table, tensors, number, BETA2)
    m += (1 - beta1).to(tl.float32) * (x - m)
    v = beta2.to(tl.float32) * v + (1 - beta2).to(tl.float32) * x * x
    write(m_at, at, m, inside, 0, tl.float32, ALIGNED, False)
    write(v_at, at, v, inside, 0, tl.float32, ALIGNED, False)
    mean = m / correction(rate(table, tensors, number, LOG_BETA1), count)
    root = tl.sqrt_rn(v) / tl.sqrt_rn(correction(rate(table, tensors, number, LOG_BETA2), count))
    eps = rate(table, tensors, number, EPS).to(tl.float32)
    u = tl.where(inside, mean / (root + eps), 0.0)
    lr = rate(table, tensors, number, LR).to(tl.float32)
    weight = word(table, tensors, number, WEIGHT)
    touched = at < tl.where(moves | decays, numel, 0)
    w = read(weight, at, touched, WEIGHTS, ALIGNED)
    key = mixed(word(table, tensors, number, SEED).to(tl.uint32))
    noise = noise_of(key, mixed(at.to(tl.uint32)))
    write(weight, at, w * keep - lr * u, touched, noise, WEIGHTS, ALIGNED, STOCHASTIC)


@triton.jit(do_not_specialize=["rows", "cols", "numel"])
def tile_sums_of_one(
    grid, parts, rows, cols, numel,
    ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """`tile_sums` of one tensor: parts (⌈cols / BN⌉, rows), then (⌈rows / BR⌉, cols)."""
    rows, cols, numel = rows.to(tl.int64), cols.to(tl.int64), numel.to(tl.int64)
    col_part = parts + tl.cdiv(cols, BN) * rows
    address = grid.to(tl.int64)
    DTYPE: tl.constexpr = grid.dtype.element_ty
    sum_tile(address, rows, cols, numel, tl.program_id(0), parts, col_part, DTYPE, ALIGNED, BM, BN, STEPS)


@triton.jit(do_not_specialize=["rows", "cols"])
def fold_sums_of_one(parts, sums, rows, cols, BN: tl.constexpr, BR: tl.constexpr):
    """`fold_sums` of one tensor: sums (rows + cols,) fp32."""
    rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    program, blocks = tl.program_id(0), tl.cdiv(rows, FOLDED)
    is_row = program < blocks
    size = tl.where(is_row, rows, cols)
    at = tl.where(is_row, program, program - blocks) * FOLDED + tl.arange(0, FOLDED)
    part = parts + tl.where(is_row, 0, tl.cdiv(cols, BN) * rows)
    total = fold(part, tl.where(is_row, tl.cdiv(cols, BN), tl.cdiv(rows, BR)), size, at)
    tl.store(sums + tl.where(is_row, 0, rows) + at, total, mask=at < size)


@triton.jit(do_not_specialize=["rows", "cols", "first", "last", "keep", "lr", "eps", "seed"])
def whiten_and_apply_one(
    grid, weight, a, b, rows, cols, first, last, keep, lr, eps, seed,
    STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """`whiten_and_apply` of one tensor, entries first to last of whose grid are W's."""
    rows, cols = rows.to(tl.int64), cols.to(tl.int64)
    first, last = first.to(tl.int64), last.to(tl.int64)
    DTYPE: tl.constexpr = grid.dtype.element_ty
    WEIGHTS: tl.constexpr = weight.dtype.element_ty
    move_tile(
        grid.to(tl.int64), weight.to(tl.int64), a, b, rows, cols, first, last, tl.program_id(0), rows > 0, keep, lr,
        eps, seed.to(tl.uint32), keep != 1.0, DTYPE, WEIGHTS, STOCHASTIC, ALIGNED, False, BM, BN, STEPS,
    )  # fmt: skip


def tile_width(cols: int, itemsize: int) -> int:
    """Choose the columns of a tile: a warp loads a row of it at once, 16 bytes a thread, and sums it without others."""
    return min(256 if itemsize == 2 else 128, max(32, triton.next_power_of_2(cols)))


def tile_height(across: int, entries: int) -> int:
    """Choose the rows of a tile, of tensors of so many entries in all."""
    return (TILE if entries > SMALL_WAVE else SMALL_TILE) // across


def passes(across: int, down: int, loaded: int) -> dict[str, int]:
    """Say how a program goes through a tile, so many entries at a time: STEPS times BM rows by BN columns."""
    return {"BM": loaded // across, "BN": across, "STEPS": down * across // loaded}


def aligned(layout: Layout, *addresses: int) -> bool:
    """Whether a grid can be read 16 bytes at a time: no row begins, and the tensor does not end, in the middle."""
    return layout.cols % 8 == 0 and layout.numel % 8 == 0 and all(address % 16 == 0 for address in addresses)


def square_sums(gradient: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Give the row and column sums of g² in one read; the first add up to ‖g‖².

    Args:
        gradient: of `layout.numel` entries in any shape, fp32, bf16 or fp16; a vector needs no padding to its grid.
        layout: its grid.

    Returns:
        (rows,) and (cols,) fp32, views of one tensor (rows + cols,).
    """
    flat = gradient.reshape(-1)
    rows, cols = layout.rows, layout.cols
    wide = tile_width(cols, flat.element_size())
    high = tile_height(wide, layout.numel)
    down, across = triton.cdiv(rows, high), triton.cdiv(cols, wide)
    parts = torch.empty(across * rows + down * cols, dtype=torch.float32, device=flat.device)
    sums = torch.empty(rows + cols, dtype=torch.float32, device=flat.device)
    folds = triton.cdiv(rows, FOLDED.value) + triton.cdiv(cols, FOLDED.value)
    shape = (rows, cols, layout.numel, aligned(layout, flat.data_ptr()))
    with on_device_of(flat):
        tile_sums_of_one[(down * across,)](flat, parts, *shape, **passes(wide, high, SUMMED), **ONE_WARP)
        fold_sums_of_one[(folds,)](parts, sums, rows, cols, wide, high, **FOUR_WARPS)
    row, col = sums.split([rows, cols])
    return row, col


def apply_whitened(
    weight: Tensor,
    grid: Tensor,
    layout: Layout,
    a: Tensor,
    b: Tensor,
    eps: float,
    lr: float,
    decay: float,
    seed: int | None,
    offset: int = 0,
) -> None:
    """W ← (1 − decay)·W − lr·w in one launch, as `sgc.step.apply_whitened`.

    Args:
        weight: contiguous.
        grid: of the gradient, (rows, cols), contiguous.
        layout: of the grid.
        a: (rows,) fp32, 0 in a row without gradient.
        b: (cols,) fp32.
        eps: ε.
        lr: learning rate times scale, negative to maximize.
        decay: learning rate times weight decay.
        seed: 32 bits, of the stochastic rounding of bf16 weights; None: to nearest.
        offset: entries of the grid that precede W's.
    """
    wide = tile_width(layout.cols, grid.element_size())
    high = tile_height(wide, grid.numel())
    fits = all(size % 8 == 0 for size in (layout.cols, offset, weight.numel()))
    fits = fits and all(tensor.data_ptr() % 16 == 0 for tensor in (grid, weight))
    programs = triton.cdiv(layout.rows, high) * triton.cdiv(layout.cols, wide)
    stochastic = seed is not None and weight.dtype is torch.bfloat16
    signed = (seed or 0) - ((seed or 0) >> 31 << 32)  # always an int32, whatever the seed
    with on_device_of(weight):
        whiten_and_apply_one[(programs,)](
            grid, weight, a, b, layout.rows, layout.cols, offset, offset + weight.numel(), 1.0 - decay,
            float(lr), float(eps), signed, stochastic, fits, **passes(wide, high, MOVED), **FOUR_WARPS,
        )  # fmt: skip
    torch.autograd.graph.increment_version(weight)


def log_or_less(beta: float) -> float:
    """Give ln β, −∞ for β = 0."""
    return math.log(beta) if beta > 0 else -math.inf

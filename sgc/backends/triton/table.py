"""The table through which one launch serves many tensors, and what all kernels of it share.

A column of 8-byte words for each tensor lies in device memory: addresses, sizes, rates. A program finds its tensor by
its number. Nothing that changes from step to step is an argument of a kernel, so nothing is compiled anew.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
TOTALS = tl.constexpr(256)  # sums of programs that are loaded at a time
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


def log_or_less(beta: float) -> float:
    """Return ln β, −∞ for β = 0."""
    return math.log(beta) if beta > 0 else -math.inf

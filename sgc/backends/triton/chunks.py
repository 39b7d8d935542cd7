"""What the kernels of the sketch path share: where a chunk's entries lie, keys of the top entries, signs from bits.

A tile is (C, N): C chunks, N the power of two that holds their n entries. A is held as sign bits, 32 rows to a word,
(⌈k/32⌉, n): 1/32 of the fp32 matrix, so that it stays in the L1 cache next to a kernel's tiles at every k and n in use
(4 KiB at n = 1024, k = 32); making a word costs two instructions for a load and a dozen for the hash, and unpacking it
is the same for both. The hash itself stays in one place, `sgc.codec.project.sign_columns`.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from sgc.codec.layout import Layout


TAKEN = tl.constexpr(-3)  # key of an entry that has been taken
OUTSIDE = tl.constexpr(-2)  # key of an entry beyond n
PADDING = tl.constexpr(-1)  # key of an entry of the chunk that is not the tensor's
NO_TAG = tl.constexpr(1 << 30)


def power_of_two(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def group_length(n: int, slots: int) -> int:
    """Return the length L of groups of n entries, `slots` groups or more: n/L + slots·L, what is searched, is least."""
    lengths = [1 << power for power in range(6) if n >> power >= slots]
    return min(lengths, key=lambda length: n // length + slots * length)


def shape_of(layout: Layout) -> dict[str, int | bool]:
    """Return what a kernel is compiled for: how many layouts a model has, so many versions of it."""
    return {
        "N": layout.chunk,
        "COLS": layout.cols,
        "PIECES": layout.chunks_per_row,
        "ROWS": layout.rows_per_chunk,
        "PADDED": layout.padded,
    }


def root_of(sketch_size: int) -> float:
    """Return 1/√k, the size of the entries of A."""
    return 1 / math.sqrt(sketch_size)


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Launch on the GPU that holds a tensor, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def start_of(chunk, N: tl.constexpr, COLS: tl.constexpr, PIECES: tl.constexpr):
    """Position of a chunk's first entry in the flattened tensor, int64 as `chunk` is."""
    if PIECES > 1:
        return chunk // PIECES * COLS + chunk % PIECES * N
    else:
        return chunk * N


@triton.jit
def is_real(
    chunk, entry, chunks, numel, N: tl.constexpr, COLS: tl.constexpr, PIECES: tl.constexpr, PADDED: tl.constexpr
):
    """Whether entries of chunks, shapes that broadcast, are the tensor's."""
    real = (chunk < chunks) & (entry < N)
    if PADDED:
        if PIECES > 1:
            real &= chunk % PIECES * N + entry < COLS
        else:
            real &= chunk * N + entry < numel
    return real


@triton.jit
def magnitude(x):
    """A key that orders as |x| does: the bits of a float ≥ 0."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def tag_of(entry, x):
    """An entry and the sign of its value in one number that orders as the entry does."""
    return entry * 2 + (x.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)


@triton.jit
def signed(key, tag):
    """The value whose magnitude and tag these are."""
    x = key.to(tl.float32, bitcast=True)
    return tl.where(tag & 1 == 1, -x, x)


@triton.jit
def flipped(x, word, row):
    """x where bit `row` mod 32 of a word is set, and −x elsewhere, of shapes that broadcast."""
    sign = ~(word << (31 - row % 32)) & -0x80000000
    return (x.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def popcount(x):
    """Set bits of int32 words, in the form that LLVM turns into one instruction."""
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)

"""The hashed sign matrix A, and (index, value) → sketch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from sgc.backends import stage

HELD_ENTRIES = 1 << 20  # an A of up to so many entries is held (4 MiB in fp32), a larger one is made blockwise
MOST_ENTRIES = 1 << 32  # an A beyond this would take minutes a step to make, and is refused
_WORD = 0xFFFFFFFF
Word = TypeVar("Word", int, Tensor)


def mix(x: Word) -> Word:
    """Scramble 32-bit words held in int64: the `lowbias32` integer hash (C. Wellons, hash-prospector, 2018)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def sign_words(columns: Tensor, sketch_size: int, seed: int) -> Tensor:
    """Make the signs of columns of A as bits, the same on every rank, device, machine and release. (ours)

    The sign of (column, row) is bit `row % 32` of hash(seed, column, 1 + row // 32), set where it is positive. So a
    prefix of the rows or columns of a larger A is the smaller A (rows up to the factor 1/√k).

    Args:
        columns: (m,) int64 column numbers, below 2³².
        sketch_size: k, the rows of A.
        seed: any non-negative integer below 2⁶⁴.

    Returns:
        (m, ⌈k/32⌉) int64 below 2³², bits beyond row k zero.
    """
    words = math.ceil(sketch_size / 32)
    column = mix(columns & _WORD ^ mix(seed & _WORD)) ^ mix(seed >> 32)
    word = torch.arange(1, words + 1, device=columns.device) * 0x9E3779B1 & _WORD  # from 1: the hash of 0 is 0
    bits = mix(mix(column)[:, None] ^ mix(word))
    bits[:, -1] &= _WORD >> (-sketch_size % 32)
    return bits


def sign_columns(columns: Tensor, sketch_size: int, seed: int) -> Tensor:
    """Make columns of A, signs ±1/√k, arguments as for `sign_words`: (m, k) fp32, a column of unit norm in each row."""
    bits = sign_words(columns, sketch_size, seed)
    row = torch.arange(32, device=columns.device)
    signs = ((bits[:, :, None] >> row) & 1).view(len(columns), -1)[:, :sketch_size]
    return (signs.float() * 2 - 1) * (1 / math.sqrt(sketch_size))  # a quotient is rounded differently on a GPU


class Projection:
    """A ∈ R^{k×n} for every n: held once, in its transpose, as far as it is held at all.

    Args:
        sketch_size: k.
        seed: of the hash.
    """

    def __init__(self, sketch_size: int, seed: int) -> None:
        self.sketch_size, self.seed = sketch_size, seed
        self._held: dict[torch.device, Tensor] = {}
        self._words: dict[torch.device, Tensor] = {}

    def holds(self, n: int) -> bool:
        """Whether A[:, :n] is small enough to be held."""
        return n * self.sketch_size <= HELD_ENTRIES

    def columns(self, n: int, device: torch.device) -> Tensor:
        """Return A[:, :n] as its transpose (n, k), made once and held."""
        held = self._held.get(device)
        if held is None or held.shape[0] < n:
            held = self._held[device] = sign_columns(torch.arange(n, device=device), self.sketch_size, self.seed)
        return held[:n]

    def column_blocks(self, n: int, device: torch.device, entries: int = 1 << 20) -> Iterator[tuple[int, Tensor]]:
        """Yield (first column, block of columns (m, k)) over A[:, :n], made anew where A is not held."""
        if self.holds(n):
            yield 0, self.columns(n, device)
            return
        step = max(1, entries // self.sketch_size)
        for start in range(0, n, step):
            block = torch.arange(start, min(start + step, n), device=device)
            yield start, sign_columns(block, self.sketch_size, self.seed)

    def words(self, n: int, device: torch.device) -> Tensor:
        """Return the signs of A[:, :n] as bits, made once and held: (⌈k/32⌉, at least n) int32, as `sign_words`."""
        held = self._words.get(device)
        if held is None or held.shape[1] < n:
            bits = sign_words(torch.arange(n, device=device), self.sketch_size, self.seed)
            held = self._words[device] = bits.to(torch.int32).T.contiguous()
        return held

    def sign_bits(self, n: int) -> Tensor:
        """Return the signs of A[:, :n] as bits on the CPU, (⌈k/32⌉, n) int32, made anew and not held."""
        return sign_words(torch.arange(n, device="cpu"), self.sketch_size, self.seed).to(torch.int32).T

    def gather(self, index: Tensor, n: int) -> Tensor:
        """Return the columns of A at `index` (c, s) as (c, s, k)."""
        if self.holds(n):
            return self.columns(n, index.device)[index]
        made = sign_columns(index.reshape(-1), self.sketch_size, self.seed)
        return made.view(*index.shape, self.sketch_size)

    def project(self, index: Tensor, value: Tensor, n: int) -> Tensor:
        """Project sparse chunks: y = A[:, index]·value.

        Args:
            index: (c, s) positions in chunks of n.
            value: (c, s) fp32.
            n: entries of a chunk.

        Returns:
            (c, k) fp32; at k ≥ n the sparse chunks themselves, (c, n).
        """
        if self.sketch_size >= n:
            return value.new_zeros(index.shape[0], n).scatter_(1, index, value)
        if self.holds(n):
            return project(value, index, self.columns(n, index.device))
        y = value.new_zeros(index.shape[0], self.sketch_size)
        step = max(1, (1 << 20) // self.sketch_size)
        for start in range(0, index.shape[1], step):
            part = slice(start, start + step)
            y += (value[:, part, None] * self.gather(index[:, part], n)).sum(1)
        return y

    def correlate(self, sketch: Tensor, n: int) -> Tensor:
        """Correlate sketches (c, k) with every column of A: (c, n)."""
        if self.holds(n):
            return sketch @ self.columns(n, sketch.device).T
        return torch.cat([sketch @ block.T for _, block in self.column_blocks(n, sketch.device)], dim=1)

    def bytes(self) -> int:
        """Bytes of A really held, over all devices."""
        held = (*self._held.values(), *self._words.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


@stage("encode")
def project(value: Tensor, index: Tensor, columns: Tensor) -> Tensor:
    """Project sparse chunks, value and index (c, s), by A given as its transpose (n, k): (c, k)."""
    return torch.nn.functional.embedding_bag(
        index.contiguous(), columns, per_sample_weights=value.contiguous(), mode="sum"
    )


def check_projection(n: int, sketch_size: int) -> None:
    """Refuse an A that could not be made in reasonable time.

    Raises:
        ValueError: n · sketch_size exceeds 2³².
    """
    if sketch_size < n and n * sketch_size > MOST_ENTRIES:
        raise ValueError(
            f"one chunk of {n} entries with sketch_size={sketch_size} needs a projection of {n * sketch_size} entries, "
            f"above the bound of {MOST_ENTRIES}; set chunk_size, or a smaller sketch_size"
        )

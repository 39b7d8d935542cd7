"""The stochastic quantizer with exact bit accounting, and its top-j form for thin links.

[LFL] arXiv 2006.10672; the choice of (j, q) within a budget is ours.
"""

from __future__ import annotations

import bisect
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sgc.checks import whole

SCALARS = 64  # bits for min|x| and max|x|
MOST_BITS = 16  # a level's bits at most: beyond, fp32 itself is the limit
_EXACT_BINOMIAL = 1 << 15  # vectors up to so long have their position bits counted in whole numbers


@dataclass(frozen=True)
class Quantized:
    """What travels for one vector.

    Args:
        value: (j,) fp32, the quantized entries as the receiver reads them.
        index: (j,) their positions, or None where all d travel.
        size: d.
        levels: q.
        bits: the message's exact cost.
    """

    value: Tensor
    index: Tensor | None
    size: int
    levels: int
    bits: int

    def dense(self) -> Tensor:
        """Return the vector (d,) that the receiver reads."""
        if self.index is None:
            return self.value
        return torch.zeros(self.size).index_put_((self.index,), self.value)


def level_bits(levels: int) -> int:
    """Count the bits of one entry: its sign and its level, 1 + ⌈log2(q + 1)⌉."""
    return 1 + levels.bit_length()


def position_bits(size: int, entries: int) -> int:
    """Count the bits that name which j of d entries travel: ⌈log2 C(d, j)⌉."""
    if size <= _EXACT_BINOMIAL or min(entries, size - entries) <= 64:
        return (math.comb(size, entries) - 1).bit_length()
    return math.ceil(float(_log2_binomial(size)[entries]))


def message_bits(size: int, levels: int, entries: int | None = None) -> int:
    """Count the bits of a message: 64 + d·(1 + ⌈log2(q+1)⌉); of j entries 64 + j·(1 + ⌈log2(q+1)⌉) + ⌈log2 C(d, j)⌉.

    Args:
        size: d.
        levels: q, at least 1.
        entries: j, or None for all.
    """
    if entries is None or entries == size:
        return SCALARS + size * level_bits(levels)
    return SCALARS + entries * level_bits(levels) + position_bits(size, entries)


def quantize(x: Tensor, levels: int, generator: torch.Generator) -> Tensor:
    """Round every magnitude to one of q + 1 levels between min|x| and max|x|, up or down at random, unbiased. [LFL]

    u = q(|x| − min|x|)/(max|x| − min|x|), E[l] = u, Q(x) = sign(x)·(min|x| + (max|x| − min|x|)·l/q); where all
    magnitudes are equal the result is exact. E‖Q(x) − x‖² ≤ d(max|x| − min|x|)²/(4q²).

    Args:
        x: (d,) fp32, finite, d ≥ 1.
        levels: q, at least 1.
        generator: of the roundings.

    Returns:
        (d,) fp32.

    Raises:
        ValueError: q below 1.
    """
    whole("levels", levels, at_least=1)
    magnitude = x.abs()
    low, high = magnitude.min(), magnitude.max()
    if low == high:
        return x.clone()
    scale = levels / (high - low)
    if not scale.isfinite():  # equal but for numbers so small that fp32 can't divide by them
        return x.clone()
    u = (magnitude - low) * scale
    floor = u.floor()
    level = floor + (torch.rand(x.shape, generator=generator) < u - floor)
    return x.sign() * (low + (high - low) * level.clamp_(max=levels) / levels)


def quantize_within(x: Tensor, budget: float, generator: torch.Generator) -> Quantized | None:
    """Quantize a vector into a budget of bits: the j largest entries at q levels, (j, q) chosen for the least error.

    Args:
        x: (d,) fp32, finite.
        budget: bits, `inf` for the quantizer's top levels.
        generator: of the roundings.

    Returns:
        The message, or None where the budget holds not even one entry.
    """
    magnitude, order = x.abs().sort(descending=True, stable=True)
    choice = choose(magnitude, budget)
    if choice is None:
        return None
    entries, levels = choice
    bits = message_bits(len(x), levels, entries)
    if entries == len(x):
        return Quantized(quantize(x, levels, generator), None, len(x), levels, bits)
    index = order[:entries].sort().values
    return Quantized(quantize(x[index], levels, generator), index, len(x), levels, bits)


def choose(magnitude: Tensor, budget: float) -> tuple[int, int] | None:
    """Choose how many entries travel and at how many levels, for the least expected squared error. (ours)

    The error of sending j entries is the energy of the rest plus the variance of the rounding: exactly
    Σ(|x| − min)(max − |x|) at one level, and taken as j·step²/6, its mean over evenly spread entries, at more.

    Args:
        magnitude: (d,) sorted, the largest first.
        budget: bits.

    Returns:
        (j, q), or None where the budget holds not even one entry.
    """
    size, positions = len(magnitude), _position_bits_table(size=len(magnitude))
    every = magnitude.double()
    total, most = every.square().sum(), _entries_within(size, 1, budget)
    x, count = every[:most], torch.arange(1, most + 1, dtype=torch.float64)
    kept, sums = x.square().cumsum(0), x.cumsum(0)
    best: tuple[float, int, int] | None = None
    for b in range(1, MOST_BITS + 1):
        levels, most = 2**b - 1, _entries_within(size, b, budget)
        if not most:
            break
        fits = SCALARS + count[:most] * (1 + b) + positions[:most] <= budget
        low = x[:most]
        if levels == 1:
            rounding = (x[0] * sums - kept)[:most] - low * x[0] * count[:most] + low * sums[:most]
        else:
            rounding = count[:most] * ((x[0] - low) / levels).square() / 6
        error = torch.where(fits, (total - kept[:most]).clamp_min(0) + rounding.clamp_min(0), math.inf)
        j = int(error.argmin())
        if best is None or float(error[j]) < best[0]:
            best = (float(error[j]), j + 1, levels)
    return None if best is None else best[1:]


def _entries_within(size: int, bits: int, budget: float) -> int:
    """Return the largest j at which a message of j entries of 1 + bits bits can fit a budget, or 0.

    The cost is concave in j: where all d do not fit, those that do are the first ones.
    """
    if SCALARS + size * (1 + bits) <= budget:
        return size
    table = _position_bits_table(size)
    return bisect.bisect_right(range(size), budget, key=lambda i: SCALARS + (i + 1) * (1 + bits) + float(table[i]))


@functools.lru_cache(maxsize=8)
def _log2_binomial(size: int) -> Tensor:
    """Compute log2 C(d, j) for j from 0 to d, float64."""
    j = torch.arange(size + 1, dtype=torch.float64)
    return (math.lgamma(size + 1) - torch.lgamma(j + 1) - torch.lgamma(size - j + 1)) / math.log(2)


@functools.lru_cache(maxsize=8)
def _position_bits_table(size: int) -> Tensor:
    """Compute ⌈log2 C(d, j)⌉ for j from 1 to d, float64.

    From 2 to d − 2 entries no binomial is a power of two, so rounding its logarithm up is safe.
    """
    table = _log2_binomial(size).ceil()
    table[[0, size]] = 0.0
    table[[1, size - 1]] = float((size - 1).bit_length())
    return table[1:]

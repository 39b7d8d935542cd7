"""x → (index, value): the s entries of largest magnitude of each chunk."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HEAP = (
    64  # on a CPU torch.topk keeps a heap where n ≥ 64·s, and partitions the whole row, three times slower, elsewhere
)
SMALLEST_SHARE = 16  # below n/s = 16 so many groups are reached that grouping gains nothing
LARGEST_NETWORK = 16  # the most entries for which a sorting network beats topk


def top_entries(x: Tensor, sparsity: int) -> tuple[Tensor, Tensor]:
    """Select the `sparsity` entries of largest magnitude of each chunk; ties go to the lowest index.

    Args:
        x: (c, n) chunks, finite.
        sparsity: s, from 1 to n.

    Returns:
        index (c, s) int64, ascending in each chunk, and value (c, s) in the dtype of x.
    """
    if sparsity >= x.shape[1]:
        return top_indices(x, sparsity), x.clone()
    index = top_indices(x.abs(), sparsity)
    return index, x.gather(1, index)


def spread(index: Tensor, value: Tensor, busy: Tensor) -> tuple[Tensor, Tensor]:
    """Put what was found in the busy chunks in its place among all; the others get the first positions, and zeros."""
    all_index = torch.arange(index.shape[1], device=index.device).repeat(len(busy), 1)
    all_value = value.new_zeros(all_index.shape)
    all_index[busy], all_value[busy] = index, value
    return all_index, all_value


def top_indices(magnitude: Tensor, sparsity: int) -> Tensor:
    """Select as `top_entries` does by magnitudes (c, n), which may be as low as −1: index (c, s) int64, ascending."""
    n = magnitude.shape[1]
    if sparsity >= n:
        return torch.arange(n, device=magnitude.device).expand(magnitude.shape[0], n)
    if sparsity == 1:
        return magnitude.argmax(1, keepdim=True)  # the first of several maxima
    if magnitude.device.type == "cpu" and len(magnitude) and SMALLEST_SHARE * sparsity <= n < HEAP * (sparsity + 1):
        return _top_by_groups(magnitude, sparsity)
    # unsorted selection and a sort of the few is three times faster on a CPU than a sorted selection
    best, index = magnitude.topk(sparsity + 1, dim=1, sorted=False)
    best, order = best.sort(1, descending=True)
    index = index.gather(1, order[:, :-1])
    tied = (best[:, -1] == best[:, -2]).nonzero().squeeze(1)
    if tied.numel():  # topk may keep any of the entries that tie at the cut
        index[tied] = _top_of_tied(magnitude[tied], sparsity)
    return index.sort(1).values


def _top_of_tied(magnitude: Tensor, sparsity: int) -> Tensor:
    """Select by (magnitude, lowest index) through one integer key: the bits of a float sort as the float does."""
    n, bits = magnitude.shape[1], magnitude.float().view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = bits.long() * n + torch.arange(n - 1, -1, -1, device=magnitude.device)
    return key.topk(sparsity, dim=1, sorted=False).indices


def _top_by_groups(magnitude: Tensor, sparsity: int) -> Tensor:
    """Select in two steps: the s groups of √(n/s) entries with the largest maxima hold the s largest entries.

    Groups are strided, entry j is in group j mod (number of groups), so that the maxima are taken over whole vectors.
    """
    chunks, n = magnitude.shape
    width = 1 << (math.isqrt(n // sparsity).bit_length() - 1)
    groups = math.ceil(n / width)
    if width * groups != n:
        magnitude = torch.nn.functional.pad(magnitude, (0, width * groups - n), value=-2.0)
    grid = magnitude.view(chunks, width, groups)
    group, clear = _reaching(grid.amax(1), sparsity)
    members = grid.gather(2, group[:, None].expand(chunks, width, sparsity)).view(chunks, -1)
    member, also_clear = _reaching(members, sparsity)
    row = member // sparsity
    index = row * groups + group.gather(1, member - row * sparsity)
    clear = clear & also_clear
    if not clear.all():  # several groups, or entries, tie at the cut
        index[~clear] = _top_of_tied(magnitude[~clear, :n], sparsity).sort(1).values
    return index


def _reaching(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ascending positions (c, count) of the `count` largest of each row, and if they are so many (c,)."""
    chunks, n = values.shape
    reached = values >= _smallest_of_top(values, count)
    clear = torch.ones(chunks, dtype=torch.bool, device=values.device)
    position = reached.view(-1).nonzero()
    if len(position) != chunks * count:  # ties (or NaN, which reaches nothing)
        clear = reached.sum(1) == count
        reached[~clear] = torch.arange(n, device=values.device) < count
        position = reached.view(-1).nonzero()
    return position.remainder_(n).view(chunks, count), clear


def _smallest_of_top(values: Tensor, count: int) -> Tensor:
    """Return the `count`-th largest of each row, (c, 1), from what is at least −1."""
    if count > LARGEST_NETWORK:
        return values.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    chunks, n = values.shape
    run = 1 << (count - 1).bit_length()
    runs = 1 << (math.ceil(n / run) - 1).bit_length()
    held = values.new_empty(runs * run, chunks)  # vectors run over chunks
    held[:n] = values.T
    held[n:] = -2.0
    spare = torch.empty_like(held)
    half = 1
    while half < run:  # a bitonic network sorts each run of so many, the largest first
        first, second = held.view(-1, 2, half, chunks).unbind(1)
        _order(first, second.flip(1), spare.view(-1, 2, half, chunks))
        held, spare = _sort_bitonic(spare, held, half // 2)
        half *= 2
    while runs > 1:  # of two sorted runs, the larger of each pair of opposites are the largest of both
        first, second = held.view(-1, 2, run, chunks).unbind(1)
        runs //= 2
        held, spare = spare[: runs * run], held[: runs * run]
        torch.maximum(first, second.flip(1), out=held.view(runs, run, chunks))
        held, spare = _sort_bitonic(held, spare, run // 2)
    return held[count - 1, :, None]


def _sort_bitonic(held: Tensor, spare: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Sort every bitonic run of 2·half rows, the largest first; gives the sorted tensor, and the one to overwrite."""
    while half:
        first, second = held.view(-1, 2, half, held.shape[1]).unbind(1)
        _order(first, second, spare.view(-1, 2, half, held.shape[1]))
        held, spare = spare, held
        half //= 2
    return held, spare


def _order(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Put the larger of each pair into out[:, 0], the smaller into out[:, 1]."""
    larger, smaller = out.unbind(1)
    torch.maximum(a, b, out=larger)
    torch.minimum(a, b, out=smaller)

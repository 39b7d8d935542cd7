"""x → (index, value): the s entries of largest magnitude of each chunk."""

from __future__ import annotations

import torch
from torch import Tensor


def top_entries(x: Tensor, sparsity: int) -> tuple[Tensor, Tensor]:
    """Select the `sparsity` entries of largest magnitude of each chunk; ties go to the lowest index.

    Args:
        x: (c, n) chunks, finite.
        sparsity: s, from 1 to n.

    Returns:
        index (c, s) int64, ascending in each chunk, and value (c, s) in the dtype of x.
    """
    n = x.shape[1]
    if sparsity >= n:
        return torch.arange(n, device=x.device).expand(x.shape[0], n), x.clone()
    magnitude = x.abs()
    if sparsity == 1:
        index = magnitude.argmax(1, keepdim=True)  # the first of several maxima
    else:
        # unsorted selection and a sort of the few is three times faster on a CPU than a sorted selection
        best, index = magnitude.topk(sparsity + 1, dim=1, sorted=False)
        best, order = best.sort(1, descending=True)
        index = index.gather(1, order[:, :-1])
        tied = (best[:, -1] == best[:, -2]).nonzero().squeeze(1)
        if tied.numel():  # topk may keep any of the entries that tie at the cut
            index[tied] = _top_of_tied(magnitude[tied], sparsity)
        index = index.sort(1).values
    return index, x.gather(1, index)


def _top_of_tied(magnitude: Tensor, sparsity: int) -> Tensor:
    """Select by (magnitude, lowest index) through one integer key: the bits of a float ≥ 0 sort as the float does."""
    n = magnitude.shape[1]
    key = magnitude.float().view(torch.int32).long() * n + torch.arange(n - 1, -1, -1, device=magnitude.device)
    return key.topk(sparsity, dim=1, sorted=False).indices

"""Apply: W ← (1 − decay)·W − lr·u, for updates of every entry, of some entries and of none, and the rounding of W."""

from __future__ import annotations

import torch
from torch import Tensor

from sgc.backends import stage
from sgc.codec.encode import Whitening
from sgc.codec.layout import BLOCK_ENTRIES, Layout


def move(weight: Tensor, update: Tensor | None, lr: float, decay: float, generator: torch.Generator | None) -> None:
    """W ← (1 − decay)·W − lr·u in fp32 or wider, rounded once; without u, only decay.

    Args:
        weight: any shape and strides, changed in place.
        update: u, of the same shape in fp32, or None.
        lr: learning rate times scale, negative to maximize.
        decay: learning rate times weight decay.
        generator: rounds bf16 weights stochastically; None: to nearest.
    """
    if update is None and not decay:
        return
    exact = torch.promote_types(weight.dtype, torch.float32)
    new = weight if weight.dtype is exact else weight.to(exact)  # in place where nothing is rounded
    if decay:
        new.mul_(1 - decay)
    if update is not None:
        new.sub_(update, alpha=lr)
    if new is not weight:
        weight.copy_(rounded(new, weight.dtype, generator))


def rounded(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Round to the dtype of the weights: stochastically to bf16 given a generator, else to nearest."""
    return stochastic_round(x, generator) if dtype is torch.bfloat16 and generator is not None else x.to(dtype)


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 to bf16 up or down at random, so that the mean of the result is x.

    A bf16 is the upper half of an fp32: 16 random bits added below the cut carry into it with the right probability.
    """
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    return ((x.view(torch.int32) + noise) & -65536).view(torch.float32).to(torch.bfloat16)


@stage("apply")
def apply_whitened(
    weight: Tensor,
    grid: Tensor,
    layout: Layout,
    whitening: Whitening,
    lr: float,
    decay: float,
    generator: torch.Generator | None,
    offset: int = 0,
) -> None:
    """Move every entry by the whitened gradient: u = w.

    Args:
        weight: contiguous.
        grid: of the gradient, (rows, cols).
        layout: of the grid.
        whitening: of its rows.
        lr: learning rate times scale, negative to maximize.
        decay: learning rate times weight decay.
        generator: for stochastic rounding, or None.
        offset: entries of the grid that precede the first of the weights.
    """
    flat = weight.view(-1)
    for rows, _ in layout.blocks():
        start, stop = (min(max(edge * layout.cols - offset, 0), flat.numel()) for edge in (rows.start, rows.stop))
        part, skipped = flat[start:stop], start + offset - rows.start * layout.cols
        if whitening.busy is not None and not whitening.busy[rows].any():
            move(part, None, 0.0, decay, generator)
            continue
        update = whitening.of(rows).divide(grid[rows]).clamp_(-whitening.clip, whitening.clip)
        move(part, update.view(-1)[skipped : skipped + part.numel()], lr, decay, generator)


def apply_sampled(
    weight: Tensor,
    value: Tensor,
    turn: tuple[int, int],
    layout: Layout,
    whitening: Whitening,
    lr: float,
    decay: float,
    generator: torch.Generator | None,
) -> None:
    """Move every m-th entry by the whitened gradient, of which no other is known; the others decay.

    Args:
        weight: contiguous.
        value: entries first, first + m, … of the gradient, (⌈d/m⌉,) fp32; what is beyond the tensor is not read.
        turn: first, below m, and m.
        layout: of the tensor's grid.
        whitening: of the gradient.
        lr: as for `move`.
        decay: as for `move`.
        generator: as for `move`.
    """
    first, every = turn
    if every == 1:
        apply_whitened(weight, layout.grid(value[: layout.numel]), layout, whitening, lr, decay, generator)
        return
    flat = weight.view(-1)
    for rows, _ in layout.blocks():
        start, stop = rows.start * layout.cols, min(rows.stop * layout.cols, layout.numel)
        skip = (first - start) % every
        part = flat[start:stop]
        known = value[(start + skip - first) // every :][: len(part[skip::every])]
        root = torch.outer(whitening.a[rows], whitening.b).view(-1)[: stop - start][skip::every].add(whitening.eps)
        update = (known / root).clamp_(-whitening.clip, whitening.clip)
        _move_some(part, slice(skip, None, every), update, lr, decay, generator)


@stage("apply")
def apply_sparse(
    weight: Tensor,
    layout: Layout,
    index: Tensor,
    value: Tensor,
    lr: float,
    decay: float,
    generator: torch.Generator | None,
) -> None:
    """Move the entries that an update names: u is value at its positions in the chunks, index and value (c, s')."""
    apply_entries(weight, *layout.entries(index, value), lr, decay, generator)


def apply_entries(
    weight: Tensor, position: Tensor, value: Tensor, lr: float, decay: float, generator: torch.Generator | None
) -> None:
    """Move the entries at some positions of the flattened weights, each position once."""
    flat = weight.view(-1)
    if weight.dtype is torch.float32:
        move(flat, None, 0.0, decay, None)
        flat.index_add_(0, position, value, alpha=-lr)
        return
    _move_some(flat, position, value, lr, decay, generator)


def _move_some(
    flat: Tensor,
    where: Tensor | slice,
    update: Tensor,
    lr: float,
    decay: float,
    generator: torch.Generator | None,
) -> None:
    """Move the entries at `where`, and let the others decay, each rounded once."""
    exact = torch.promote_types(flat.dtype, torch.float32)
    some = flat[where].to(exact, copy=True)
    for part in flat.split(BLOCK_ENTRIES) if decay else ():  # in fp32 and rounded it would be five times as large
        move(part, None, 0.0, decay, generator)
    move(some, update, lr, decay, None)
    flat[where] = rounded(some, flat.dtype, generator)

"""What SGC's step and hook hold for a moment: measured on one tensor, and extrapolated to larger ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sgc.codec.layout import make_layout
from sgc.optimizer import SGC
from sgc.planner.trace import Info, Tracker

STRIPS = (24, 28, 32)  # blocks, whole groups of what stages work on at a time; a tensor of more is extrapolated
Operation = tuple[Any, ...]  # an operator, and the ranks and dtypes of what it is given and makes


def most_temporaries(info: Info, group: Mapping[str, Any], every: int) -> int:
    """Bound what step and hook hold for a tensor, far above what was ever measured, so as to measure where it matters.

    Args:
        info: the tensor.
        group: the hyperparameters.
        every: m of compressed gradients; 0: gradients are whole.
    """
    if group["rank"] is not None or group["chunk_size"] is None or group["recovery"] != "threshold":
        return 1 << 62
    layout = make_layout(info.shape, group["chunk_size"])
    share = 0.0  # bytes for each entry
    if group["sketch_size"] or group["recovered"] is not None:
        sparsity = group["recovered"] or group["sparsity"]
        share = (12 * min(group["sketch_size"], layout.chunk) + 96 * sparsity) / layout.chunk * (2 if every else 1)
    elif every:
        share = 24 / every
    return (1 << 26) + round(share * info.numel) + 64 * (layout.rows + layout.cols)


def step_temporaries(info: Info, options: tuple[tuple[str, Any], ...]) -> int:
    """Find what SGC's step on one tensor holds beside weight, gradient and state, by making steps."""
    (step,) = _of_whole(info, lambda shape: _measure_step(shape, info.dtype, options))
    return step


def attached_temporaries(info: Info, options: tuple[tuple[str, Any], ...], sample_every: int) -> tuple[int, int]:
    """Find what the hook and the step hold beside weight, gradient, what is kept of it and state, by running them."""
    hook, step = _of_whole(info, lambda shape: _measure_attached(shape, info.dtype, options, sample_every))
    return hook, step


def _of_whole(info: Info, measure: Callable[[tuple[int, ...]], tuple[dict[Operation, int], ...]]) -> tuple[int, ...]:
    """Measure a tensor; of one with many blocks two strips.

    At each site what is held grows by the same with every block. The peak does not: it moves to the sites that grow
    fastest, so that every site is extrapolated and the most is sought among them then. Sites that do not grow so are
    branches that data decide, as where entries tie: what they hold more than all others is added as it is.
    """
    layout = make_layout(info.shape, 256)
    rows = next((rows.stop for rows, _ in layout.blocks()), 0)
    strips: list[tuple[int, ...]] = [(blocks * rows, layout.cols) for blocks in STRIPS]
    if len(info.shape) == 1:  # as ragged, since that makes a padded copy
        strips = [(math.prod(strip) + layout.numel - layout.rows * layout.cols,) for strip in strips]
    alike = all(make_layout(strip, 256).cols == layout.cols for strip in strips)
    if layout.rows <= STRIPS[-1] * rows or not alike:
        return tuple(max(sites.values(), default=0) for sites in measure(info.shape))
    return tuple(_extrapolated(sites, layout.rows / rows) for sites in zip(*map(measure, strips), strict=True))


def _extrapolated(strips: Sequence[dict[Operation, int]], blocks: float) -> int:
    """Return the most that is held of a tensor of so many blocks, from what is held at each operation on STRIPS."""
    first, middle, last = strips
    steady = [site for site in last if first.get(site, -1) + last[site] == 2 * middle.get(site, -1)]
    more = (blocks - STRIPS[-1]) / (STRIPS[-1] - STRIPS[0])
    irregular = max(last.values()) - max(last[site] for site in steady)
    return irregular + max(round(last[site] + (last[site] - first[site]) * more) for site in steady)


@functools.lru_cache(maxsize=256)
def _measure_step(
    shape: tuple[int, ...], dtype: torch.dtype, options: tuple[tuple[str, Any], ...]
) -> tuple[dict[Operation, int]]:
    param, optimizer = _stepped(shape, dtype, options)
    param.grad = _gradient(shape, dtype)
    return (_temporaries(param, optimizer, param.grad, optimizer.step),)


@functools.lru_cache(maxsize=256)
def _measure_attached(
    shape: tuple[int, ...], dtype: torch.dtype, options: tuple[tuple[str, Any], ...], sample_every: int
) -> tuple[dict[Operation, int], dict[Operation, int]]:
    module = nn.Module()
    param, optimizer = _stepped(shape, dtype, options)
    module.register_parameter("weight", param)
    try:
        optimizer.attach(module, sample_every=sample_every)
    except ValueError:  # so small that it is kept whole
        return {}, {}
    compressor = optimizer._compressor
    assert compressor is not None  # attached
    slot = compressor.slots[param]
    for _ in range(2):  # the second is clipped by what the first has learnt
        gradient, buffer = _gradient(shape, dtype), slot.bucket.open()
        compress = functools.partial(compressor.add, slot, gradient)
        hook = _temporaries(param, optimizer, gradient, compress, buffer.flat)
        del gradient, compress
        step = _temporaries(param, optimizer, param, optimizer.step, buffer.flat)
        param.grad = None
    return hook, step


def _stepped(
    shape: tuple[int, ...], dtype: torch.dtype, options: tuple[tuple[str, Any], ...]
) -> tuple[nn.Parameter, SGC]:
    param = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = SGC([param], **dict(options))
    optimizer.check_ranks = False
    param.grad = _gradient(shape, dtype)
    optimizer.step()
    param.grad = None
    return param, optimizer


def _gradient(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


class _ByOperation(Tracker):
    """Also record the most temporaries at each kind of operation: which it is, and of what."""

    def __init__(self) -> None:
        super().__init__()
        self.most: dict[Operation, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        given = (*args, *(made if isinstance(made, (tuple, list)) else (made,)))
        kind = (func, *((tensor.dim(), tensor.dtype) for tensor in given if isinstance(tensor, torch.Tensor)))
        self.most[kind] = max(self.now["temporaries"], self.most.get(kind, 0))
        return made


def _temporaries(
    param: nn.Parameter, optimizer: SGC, gradient: torch.Tensor, act: Callable[[], Any], *kept: torch.Tensor
) -> dict[Operation, int]:
    tracker = _ByOperation()
    for tensor in (param, gradient, *kept, *optimizer.state[param].values()):
        tracker.mark(tensor, "state")
    with torch.no_grad(), tracker:
        act()
    return tracker.most

"""What a step asks of gradients before anything moves: that they are gradients it can take, and their norms."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sgc.parallel.fsdp2 import is_flattened
from sgc.surroundings import has_numbers
from sgc.views import View


def check_gradient(param: Tensor, gradient: Tensor | None, name_of: Callable[[Tensor], str]) -> None:
    """Raise TypeError unless a gradient is dense, real and floating-point, and its tensor one that can be trained."""
    assert gradient is not None  # tensors without one take no part
    if gradient.layout is not torch.strided:
        raise TypeError(f"SGC needs dense gradients, {name_of(param)} has one in layout {gradient.layout}")
    if not gradient.is_floating_point():
        raise TypeError(f"SGC needs real floating-point gradients, {name_of(param)} has one of {gradient.dtype}")
    if is_flattened(param):
        raise TypeError(
            f"SGC needs the shapes of the tensors it trains, and FSDP1 has flattened {name_of(param)}: use "
            "FSDP2, which is torch.distributed.fsdp.fully_shard, or fsdp_version: 2 in accelerate's configuration"
        )
    check_numbers(param, gradient, name_of)


def check_numbers(param: Tensor, gradient: Tensor, name_of: Callable[[Tensor], str]) -> None:
    """Raise TypeError where a tensor or its gradient is only a shape."""
    if not (has_numbers(param) and has_numbers(gradient)):
        raise TypeError(
            f"SGC needs the numbers of what it trains, and {name_of(param)} or its gradient is only a shape "
            "(a meta or fake tensor): put the model on a device, as by model.to_empty, before the optimizer is made"
        )


def warn_if_idle(params: Sequence[Tensor]) -> bool:
    """Warn where no step will ever move anything, and return whether that is so."""
    if not params or any(param.requires_grad for param in params):
        return False
    warnings.warn(
        f"SGC trains nothing: none of its {len(params)} parameters requires a gradient. Make the optimizer after "
        "adapters are added to the model, or let parameters require gradients",
        stacklevel=7,
    )
    return True


def norms_of(views: Sequence[View]) -> dict[View, float]:
    """Compute the norm of every gradient in one wait for the device.

    Returns:
        By view: ‖g‖, inf or nan where it is not finite, −1 where no rank had a gradient.
    """
    if not views:
        return {}
    norms = [view.norm() for view in views]
    found = torch.stack([norm.to(norms[0].device) for norm in norms])
    # torch gives the norm of a single entry without squaring it: what squares make of the others is made of it here
    found = torch.where(found < 0, found, found.square().sqrt())
    return dict(zip(views, found.tolist(), strict=True))

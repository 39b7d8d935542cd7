"""What a caller may have switched on around a step, and the step's arithmetic must not notice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def shielded(params: Iterable[Tensor]) -> Iterator[None]:
    """Compute without gradients, autocast and inference mode, and make tensors on the CPU where no device is named.

    Autocast would make sketches in bf16; what is made in inference mode could never be changed outside it.

    Args:
        params: what is trained. Where these are made in inference mode themselves, nothing else can change them.
    """
    params = list(params)
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled() and not any(param.is_inference() for param in params):
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())  # last: leaving inference mode switches gradients on
        for kind in {"cpu", *(param.device.type for param in params)}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers, and not only a shape, as meta and fake tensors do."""
    if tensor.device.type == "meta":
        return False
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return True
    from torch._subclasses.fake_tensor import FakeTensor  # loaded long before where somebody made one

    return not isinstance(tensor, FakeTensor)

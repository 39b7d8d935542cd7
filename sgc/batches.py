"""Tensors that kernels update together, in a handful of launches for all of them, and what is learnt of those later."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sgc import backends
from sgc.moments import Rates
from sgc.probes import Probes
from sgc.state import DTYPES
from sgc.step import PROBED_CHUNKS, Recovered
from sgc.views import View

if TYPE_CHECKING:
    from sgc.backends.triton.batch import Batch, Pending, Sparse, TensorUpdate


class Batches:
    """The batches of one optimizer, one for each device.

    Args:
        probes: look at what is recovered.
    """

    def __init__(self, probes: Probes) -> None:
        self._probes = probes
        self._state: Any = {}  # of the optimizer, by tensor
        self._batches: dict[torch.device, Batch] = {}
        # norms that are known, and those on their way from the devices
        self._unsettled: deque[tuple[list[float], dict[torch.device, Pending]]] = deque()
        self._unborn: dict[Tensor, None] = {}  # state allocated before the first gradient was known to be finite
        self.grad_norm = math.nan  # of the last step that is settled
        self.skipped = 0  # tensors left out so far because their gradients were not finite

    def split(
        self, views: Sequence[View], state: Any, rates_of: Callable[[View], Rates]
    ) -> tuple[list[View], dict[torch.device, list[TensorUpdate]]]:
        """Take out the tensors that kernels update together.

        Args:
            views: of all whole tensors of a step.
            state: of the optimizer, by tensor.
            rates_of: gives the rates of a tensor, `t` left out.

        Returns:
            The other views; and what `update` is to be called with.
        """
        self._state = state
        rest, taken = [], dict[torch.device, "list[TensorUpdate]"]()
        devices = {view.weight.device for view in views}
        fused = {device for device in devices if backends.choose("apply", device).fused}
        for view in views:
            one = self._taken(view, rates_of) if view.weight.device in fused else None
            if one is None:
                rest.append(view)
            else:
                taken.setdefault(one.weight.device, []).append(one)
        return rest, taken

    def _taken(self, view: View, rates_of: Callable[[View], Rates]) -> TensorUpdate | None:
        """Return what a batch needs to update a tensor, or None where it can't."""
        if type(view) is not View or type(view.gradient) is not Tensor or not view.weight.numel():
            return None
        is_sparse = view.layout is not None and view.group["recovered"] is not None
        if is_sparse and not _moves_in_place(view):
            return None
        from sgc.backends.triton.batch import TensorUpdate, obstacle, sparse_obstacle

        why_not, sparse = obstacle(view.given, view.gradient), None
        if why_not is None and view.layout is not None and is_sparse:
            sparse = self._sparse(view)
            recovery = view.group["recovery"]
            if sparse_obstacle(view.weight, view.layout, view.gradient.dtype, sparse, recovery) is not None:
                return None  # the stages warn why, each for itself
        if why_not is not None and not backends.choose("apply", view.weight.device, why_not).fused:
            return None
        lr, decay, eps, betas, _ = rates_of(view)
        seed = view.tools.seed
        if "step" not in self._state[view.key]:
            self._unborn[view.key] = None
        stochastic = view.group["stochastic_rounding"]
        return TensorUpdate(
            view.given, view.gradient, view.state, view.layout, lr, decay, eps, betas, seed, stochastic, sparse
        )

    def _sparse(self, view: View) -> Sparse:
        """Describe how a batch makes the update of a tensor sparse."""
        from sgc.backends.triton.batch import Sparse

        assert view.layout is not None
        recovered = min(view.group["recovered"], view.layout.chunk)
        sparsity = recovered if view.projection is None else view.group["sparsity"]

        def noted(index: Tensor, value: Tensor, target: Tensor | None) -> None:
            self._probes.look(view, Recovered(index, value, target))

        return Sparse(sparsity, recovered, view.projection, PROBED_CHUNKS, noted if self._probes.due else None)

    def update(self, taken: dict[torch.device, list[TensorUpdate]], norms: list[float], seen_whole: bool) -> None:
        """Launch the updates that were taken out, and note the norms of the other tensors of the step.

        Where the step has not `seen_whole` tensors, and all of them, their norms say nothing of the whole gradient.
        """
        if not seen_whole:
            self.skipped += sum(not math.isfinite(norm) for norm in norms)
            return
        for device in taken:
            if device not in self._batches:
                from sgc.backends.triton.batch import Batch

                self._batches[device] = Batch(device)
        self._unsettled.append((norms, {device: self._batches[device].update(taken[device]) for device in taken}))
        if not taken:
            self.settle()

    def settle(self, wait: bool = True) -> None:
        """Learn which of the last updates were none, where kernels decided it; without `wait`, what is known by now."""
        while self._unsettled and (wait or all(one.ready() for one in self._unsettled[0][1].values())):
            norms, pending = self._unsettled.popleft()
            found: list[float] = []
            for one in pending.values():
                own = one.settle()
                found += own
                for param, norm in zip(one.weights, own, strict=True):
                    if math.isfinite(norm):
                        self._unborn.pop(param, None)
                    elif param in self._unborn and self._state[param]["step"] == 0:
                        del self._state[param], self._unborn[param]
            self.skipped += sum(not math.isfinite(norm) for norm in [*norms, *found])
            self.grad_norm = math.hypot(*(norm for norm in [*norms, *found] if not norm < 0))


def _moves_in_place(view: View) -> bool:
    """Whether a batch can move the moment of a tensor: it is held in fp32, and what is recovered just leaves it."""
    return view.projection is None or (view.rule.gives_up and DTYPES[view.group["state_dtype"]].dtype is torch.float32)

"""`SGC.for_budget`: the best sizes whose whole state fits in so many bytes."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor

from sgc.checks import whole
from sgc.state import tensor_layout
from sgc.step import PROBED_CHUNKS

_logger = logging.getLogger("sgc")


class Candidate(Protocol):
    """An optimizer that may fit."""

    param_groups: list[dict[str, Any]]

    def expected_state_bytes(self) -> int:
        """Predict the bytes of its state."""


T = TypeVar("T", bound=Candidate)


def fit(make: Callable[..., T], params: Iterable[Any], state_bytes: int, fixed: Mapping[str, Any]) -> T:
    """Make the optimizer with the largest state that fits, and log what was picked; arguments as for `for_budget`."""
    state_bytes = whole("state_bytes", state_bytes)
    params = [_listed(param) for param in params]
    smallest, refused = math.inf, None
    for picked in budget_ladder(fixed):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a candidate's warning is not the user's
                candidate = make(params, **{**picked, **fixed})
        except ValueError as error:  # what is picked may not go with what is fixed
            refused = refused or error
            continue
        needed = candidate.expected_state_bytes() + sum(map(probe_bytes, candidate.param_groups))
        smallest = min(smallest, needed)
        if needed <= state_bytes:
            optimizer = make(params, **{**picked, **fixed})
            sizes = ("chunk_size", "sketch_size", "sparsity")
            chosen = ", ".join(f"{name}={optimizer.param_groups[0][name]}" for name in sizes)
            _logger.info("SGC.for_budget: %s takes %d of %d bytes", chosen, needed, state_bytes)
            return optimizer
    if refused is not None and smallest == math.inf:
        raise refused
    raise ValueError(f"state_bytes must be at least {smallest} for these parameters, got {state_bytes}")


def probe_bytes(group: Mapping[str, Any]) -> int:
    """Count the bytes that `stats` may hold of a group beside the state: the supports and sums of a probe."""
    total = 0
    for param in group["params"]:
        layout = tensor_layout(param.shape, group)
        if param.requires_grad and layout is not None and group["recovered"] is not None:
            total += min(layout.chunks, PROBED_CHUNKS) * min(group["recovered"], layout.chunk) * 8 + 12
    return total


def _listed(params: Any) -> Any:
    """Hold the parameters of a group in a list, so that they can be gone through more than once."""
    if not isinstance(params, dict) or isinstance(params["params"], Tensor | set):
        return params
    return {**params, "params": list(params["params"])}


def budget_ladder(fixed: Mapping[str, Any]) -> Iterable[dict[str, int]]:
    """Yield (chunk_size, sketch_size, sparsity) from the largest state to the smallest, keeping what is fixed.

    k = 8·s throughout, as where `sparsity` is not given; small chunks learned better at equal n/k, and are cheaper.
    """
    ladder = [(n, 8 * s, s) for n, s in ((128, 8), (128, 4), (256, 4), (256, 2), (256, 1), (512, 1), (1024, 1))]
    sketched = [dict(zip(("chunk_size", "sketch_size", "sparsity"), sizes, strict=True)) for sizes in ladder]
    seen = []
    for picked in [*sketched, {"sketch_size": 0}]:
        free = {name: size for name, size in picked.items() if name not in fixed}
        if free not in seen:
            seen.append(free)
            yield free

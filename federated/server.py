"""The server: θ, its step by the mean of the updates, which devices it asks, and which are late."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from federated.arguments import positive, share
from federated.draws import Draws

MOST = 1e18  # of an entry of θ, or of an update times its weight: squares and sums over devices stay within fp32


def sound(update: Tensor, weight: Tensor) -> Tensor:
    """Find the updates that can be added up: all entries finite, and none above `MOST` when weighted.

    A single one that is not would turn the sum, and with it θ, into infinity or NaN for good.

    Args:
        update: (B, p) fp32.
        weight: B_m (B,).

    Returns:
        (B,) bool.
    """
    weight, largest = weight.double(), torch.linalg.vector_norm(update, math.inf, dim=1).double()
    return (weight > 0) & (weight <= MOST) & (largest * weight <= MOST)  # NaN fails every comparison


class Server:
    """θ and its step: FedAvg, or FedAvgM with momentum (Hsu et al., arXiv 1909.06335).

    v ← βv + Δ̂, θ ← θ + lr·v; FedAvg is β = 0, lr = 1.

    Args:
        theta: θ (d,) fp32, finite, owned by the server from here on.
        lr: of the server's step.
        momentum: β, in [0, 1).

    Raises:
        ValueError: a value out of range, or θ of another form.
    """

    def __init__(self, theta: Tensor, *, lr: float = 1.0, momentum: float = 0.0) -> None:
        if theta.ndim != 1 or theta.dtype != torch.float32 or not theta.isfinite().all():
            raise ValueError(f"theta must be finite numbers (d,) in float32, got {theta.dtype} {tuple(theta.shape)}")
        self.theta, self.lr, self.momentum = theta, positive("lr", lr), share("momentum", momentum)
        self.velocity = torch.zeros_like(theta) if self.momentum else None

    def step(self, update: Tensor) -> bool:
        """Move θ by the estimate (d,) of the mean update, if no entry of θ gets above `MOST` by it.

        Returns:
            Whether it has moved; where it has not, the velocity has not changed either.
        """
        velocity = update if self.velocity is None else self.momentum * self.velocity + update
        theta = self.theta + self.lr * velocity
        if not float(theta.abs().max()) <= MOST:
            return False
        self.theta, self.velocity = theta, velocity if self.momentum else None
        return True

    def state(self) -> dict[str, Tensor]:
        """Return θ and what the server remembers."""
        return {"theta": self.theta} | ({} if self.velocity is None else {"velocity": self.velocity})

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned.

        Raises:
            ValueError: it is of another size or type.
        """
        check_state(state, {name: tensor.shape for name, tensor in self.state().items()})
        self.theta, self.velocity = state["theta"], state.get("velocity")


def check_state(state: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    """Check what was remembered: tensors by name, finite, in fp32, of these shapes.

    Raises:
        ValueError: it is anything else.
    """
    if not isinstance(state, Mapping) or state.keys() != shapes.keys():
        got = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"a state must hold {', '.join(shapes) or 'nothing'}, got {got or 'nothing'}")
    for name, tensor in state.items():
        shape = tuple(shapes[name])
        if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.dtype != torch.float32:
            got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must be torch.float32 {shape}, got {got}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")


def draw_asked(num_devices: int, asked: int | None, draws: Draws) -> Tensor:
    """Draw the devices that are asked in a round, uniformly: (asked,) int64 ascending, all of them for None."""
    if asked is None or asked == num_devices:
        return torch.arange(num_devices)
    return torch.randperm(num_devices, generator=draws.generator("sample"))[:asked].sort().values


def draw_late(devices: Tensor, probability: float, draws: Draws) -> Tensor:
    """Draw which devices (B,) miss the round, each with the given probability, whoever else is asked: (B,) bool."""
    if not probability:
        return torch.zeros(len(devices), dtype=torch.bool)
    chance = [float(torch.rand(1, generator=draws.generator("late", device))) for device in devices.tolist()]
    return torch.tensor(chance) < probability

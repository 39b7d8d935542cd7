"""What the server does with the mean of the updates, whom it asks, and who comes too late."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from federated.draws import Draws


class Server:
    """θ and its step: FedAvg, or FedAvgM with momentum (Hsu et al., arXiv 1909.06335).

    v ← βv + Δ̂, θ ← θ + lr·v; FedAvg is β = 0, lr = 1.

    Args:
        theta: θ (d,) fp32, owned by the server from here on.
        lr: of the server's step.
        momentum: β, in [0, 1).

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, theta: Tensor, *, lr: float = 1.0, momentum: float = 0.0) -> None:
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.theta, self.lr, self.momentum = theta, lr, momentum
        self.velocity: Tensor | None = None

    def step(self, update: Tensor) -> None:
        """Move θ by the estimate (d,) of the mean update."""
        if self.momentum:
            self.velocity = update if self.velocity is None else self.momentum * self.velocity + update
            update = self.velocity
        self.theta = self.theta + self.lr * update

    def state(self) -> dict[str, Tensor]:
        """Give θ and what the server remembers."""
        return {"theta": self.theta} | ({} if self.velocity is None else {"velocity": self.velocity})

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.theta, self.velocity = state["theta"], state.get("velocity")


def sample(num_devices: int, wanted: int | None, draws: Draws) -> Tensor:
    """Choose the devices that are asked in a round, uniformly: (wanted,) int64 ascending, all of them for None."""
    if wanted is None or wanted == num_devices:
        return torch.arange(num_devices)
    return torch.randperm(num_devices, generator=draws.generator("sample"))[:wanted].sort().values


def late(devices: Tensor, probability: float, draws: Draws) -> Tensor:
    """Tell which devices (B,) miss the round: each with the given probability, whoever else is asked. (B,) bool."""
    if not probability:
        return torch.zeros(len(devices), dtype=torch.bool)
    chance = [float(torch.rand(1, generator=draws.generator("late", device))) for device in devices.tolist()]
    return torch.tensor(chance) < probability

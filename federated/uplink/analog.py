"""Updates sent uncoded, which the channel adds up. [NOISY] arXiv 2008.11141.

Every device scales by the same α = min_m √(T·P/‖x_m‖²), which the server knows. Signals add up unscaled and noise joins
at the end divided by α: the same numbers, since the channel is linear.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from federated.arguments import instance
from federated.channel import MultipleAccess, energy, pack, unpack
from federated.uplink.base import Uplink, UplinkRound
from sgc.checks import rate


class OverTheAirRound(UplinkRound):
    """What the rounds of uncoded uplinks have in common: energies, the common α, power; their uplinks have a channel.

    A scheme's own `add` calls `count_energy` with what it sends, its `estimate` adds `noise_over_alpha` to the sum.
    """

    uplink: Any  # with a channel

    def __post_init__(self) -> None:
        super().__post_init__()
        self.channel: MultipleAccess = self.uplink.channel
        self.symbols = self.channel.symbols_for(self.size)
        self.most, self.total, self.active_devices = 0.0, 0.0, 0
        self.traffic.channel_uses = self.symbols * self.channel.subchannels

    def count_energy(self, sent: Tensor, active: Tensor) -> None:
        """Count ‖x_m‖² of what some devices send (B, T, F), of whom some (B,) are active."""
        energies = energy(sent)
        self.most, self.total = max(self.most, float(energies.max())), self.total + float(energies.sum())
        self.active_devices += int(active.sum())
        self.traffic.silent += int((~active).sum())

    def noise_over_alpha(self, shape: tuple[int, ...]) -> Tensor:
        """Draw z/α, and record the mean transmit power that α means."""
        if not self.most:  # nothing to send: silence is understood
            return torch.zeros(shape, dtype=torch.complex64)
        alpha = math.sqrt(self.symbols * self.channel.power / self.most)
        self.traffic.power = alpha**2 * self.total / self.symbols / self.active_devices
        return self.channel.noise(shape, self.draws.generator("noise")) / alpha


class _InversionRound(OverTheAirRound):
    uplink: AnalogUplink

    def __post_init__(self) -> None:
        super().__post_init__()
        self.signal = torch.zeros(self.symbols, self.channel.subchannels, dtype=torch.complex64)
        self.active = torch.zeros(self.symbols, self.channel.subchannels)

    def add(self, devices: Tensor, payload: Tensor, weight: Tensor) -> None:
        x = pack(weight.float()[:, None] * payload, self.channel.subchannels)
        gains = self.channel.gains(devices.tolist(), self.symbols, self.draws)[:, 0]
        strong = (gains.abs() >= self.uplink.threshold) & (gains != 0)
        self.count_energy(torch.where(strong, x / gains, 0), strong.any(2).any(1))
        self.signal += torch.where(strong, x, 0).sum(0)  # h·(x/h)
        self.active += strong.sum(0)

    def estimate(self) -> Tensor | None:
        if not self.active_devices:
            return None
        received = self.signal + self.noise_over_alpha(self.signal.shape)
        mean = torch.where(self.active > 0, received / self.active.clamp_min(1), 0)
        return unpack(mean[None], self.size)[0] * (self.senders / self.weight)


class AnalogUplink(Uplink):
    """Truncated channel inversion: Δ_m/h_m where |h_m| ≥ λ, else silence; the channel adds. [NOISY]

    The server divides by the number of active devices on each subchannel; one that nobody uses gives 0.

    Args:
        channel: of one antenna.
        threshold: λ.

    Raises:
        ValueError: a negative λ, or more than one antenna.
    """

    round_type = _InversionRound

    def __init__(self, channel: MultipleAccess, threshold: float = 0.0) -> None:
        if instance("channel", channel, MultipleAccess).antennas != 1:
            raise ValueError(f"channel inversion is for antennas=1, got {channel.antennas}")
        self.channel, self.threshold = channel, rate("threshold", threshold)

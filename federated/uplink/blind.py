"""Updates sent uncoded without CSI at the devices; the server's antennas combine. [BLIND] arXiv 2010.10030."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from federated.arguments import instance
from federated.channel import MultipleAccess, pack, unpack
from federated.uplink.analog import OverTheAirRound
from federated.uplink.base import Uplink


class _BlindRound(OverTheAirRound):
    def __post_init__(self) -> None:
        super().__post_init__()
        antennas, subchannels = self.channel.antennas, self.channel.subchannels
        fresh = self.symbols if self.channel.fading == "iid" else 1
        self.signal = torch.zeros(antennas, self.symbols, subchannels, dtype=torch.complex64)
        self.gains = torch.zeros(antennas, fresh, subchannels, dtype=torch.complex64)

    def add(self, devices: Tensor, payload: Tensor, weight: Tensor) -> None:
        x = pack(weight.float()[:, None] * payload, self.channel.subchannels)
        self.count_energy(x, torch.ones(len(devices), dtype=torch.bool))
        step = max(1, (1 << 22) // self.gains.numel())
        for start in range(0, len(devices), step):
            part = slice(start, start + step)
            gains = self.channel.gains(devices[part].tolist(), self.symbols, self.draws, self.channel.antennas)
            self.gains += gains.sum(0)
            if gains.shape[2] == 1:
                self.signal += torch.einsum("baf,btf->atf", gains[:, :, 0], x[part])
            else:
                self.signal += torch.einsum("batf,btf->atf", gains, x[part])

    def estimate(self) -> Tensor | None:
        if not self.senders:
            return None
        received = self.signal + self.noise_over_alpha(self.signal.shape)
        csi_error = torch.randn(self.gains.shape, generator=self.draws.generator("csi"), dtype=torch.complex64)
        known = self.gains + csi_error * math.sqrt(self.channel.csi_error_variance)
        combined = (known.conj() * received).mean(0)
        return unpack(combined[None], self.size)[0] / (self.weight * self.channel.gain_variance)


class BlindUplink(Uplink):
    """No CSI at the devices; the server combines its antennas with what it knows of Σ_m h_{m,a}. [BLIND]

    Antenna a hears y_a = Σ_m h_{m,a}∘x_m + z_a, x_m = α(Δ_re + jΔ_im); the server knows ĥ_a = Σ_m h_{m,a} + CN(0, σ̃²),
    forms (1/N_r)Σ_a conj(ĥ_a)∘y_a and divides by α·M·σ_h². Per complex symbol the estimate of (1/M)ΣΔ_m is unbiased,
    with E|err|² = (Mσ_h² + σ̃²)(σ_h²Σ_m|x_m|² + σ²)/(N_r M² σ_h⁴ α²): see `blind_error`.

    Args:
        channel: whose gains must fade.

    Raises:
        ValueError: fading="none", under which the devices' gains do not average out.
    """

    round_type = _BlindRound

    def __init__(self, channel: MultipleAccess) -> None:
        if instance("channel", channel, MultipleAccess).fading == "none":
            raise ValueError("the blind uplink needs gains that fade independently, got fading='none'")
        self.channel = channel


def blind_error(channel: MultipleAccess, signal_energy: Tensor, num_devices: int, alpha: float) -> Tensor:
    """Return the blind uplink's E|err|² per complex symbol, in closed form. [BLIND; derived in docs/federated.md]

    (Mσ_h² + σ̃²)(σ_h²Σ_m|x_m|² + σ²)/(N_r M² σ_h⁴ α²), x_m as sent.

    Args:
        channel: the MAC.
        signal_energy: Σ_m|x_m|² of each symbol, any shape.
        num_devices: M.
        alpha: α.
    """
    gain = channel.gain_variance
    first = num_devices * gain + channel.csi_error_variance
    second = gain * signal_energy + channel.noise_variance
    return first * second / (channel.antennas * num_devices**2 * gain**2 * alpha**2)

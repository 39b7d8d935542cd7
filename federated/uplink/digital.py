"""Updates decoded one by one: exactly, or quantized. [LFL] arXiv 2006.10672."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from federated.arguments import instance
from federated.channel import Channel
from federated.downlink import budgets, capacities, split_symbols
from federated.draws import Draws
from federated.quantize import message_bits, quantize, quantize_within
from federated.uplink.base import Encoded, Uplink, UplinkRound
from sgc.checks import whole


class _SumRound(UplinkRound):
    """The weighted mean itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sum = torch.zeros(self.size)

    def add(self, devices: Tensor, payload: Tensor, weight: Tensor) -> None:
        self.sum += weight.float() @ payload

    def estimate(self) -> Tensor | None:
        return self.sum / self.weight if self.weight else None


class IdealUplink(Uplink):
    """The server receives every update without error and without cost."""

    round_type = _SumRound


class _QuantizedRound(_SumRound):
    """Messages decoded one by one, each within its device's share of the symbols."""

    uplink: QuantizedUplink

    def __post_init__(self) -> None:
        super().__post_init__()
        channel = self.uplink.channel
        if channel is not None:
            symbols = channel.ofdm_symbols or 0
            self.shares = iter(split_symbols(symbols, self.served))
            self.traffic.channel_uses, self.traffic.power = symbols * channel.subchannels, channel.power

    def budget(self, devices: Tensor) -> list[float]:
        channel = self.uplink.channel
        if channel is None:
            return super().budget(devices)
        symbols = channel.ofdm_symbols or 0
        rates = capacities(channel, devices.tolist(), symbols, self.draws).tolist()
        return budgets(rates, list(islice(self.shares, len(rates))), symbols)


class QuantizedUplink(Uplink):
    """Every device sends its update quantized, and adds what that left out to its next. [LFL]

    Args:
        levels: q of an error-free link of as many bits as that takes; None: what the channel carries decides.
        channel: gives each of the J devices T/J OFDM symbols at Σ_f log2(1 + P|h_{m,f}|²/(Fσ²)) bits (ours); the j
            largest entries go at q levels, chosen for the least error.

    Raises:
        ValueError: not exactly one of the two, levels below 1, or a channel without a budget.
    """

    round_type = _QuantizedRound

    def __init__(self, levels: int | None = None, channel: Channel | None = None) -> None:
        if (levels is None) == (channel is None):
            raise ValueError(f"give either levels or channel, got levels={levels!r} and channel={channel!r}")
        if channel is not None and instance("channel", channel, Channel).ofdm_symbols is None:
            raise ValueError("a digital link needs a budget: set the channel's ofdm_symbols")
        self.levels: int | None = whole("levels", levels, at_least=1, optional=True)
        self.channel = channel

    def memory_rows(self, num_devices: int) -> int:
        """Return M: e_m of every device."""
        return num_devices

    def encode(
        self, devices: Tensor, update: Tensor, held: Tensor | None, budget: list[float], draws: Draws
    ) -> Encoded:
        """Quantize Δ_m + e_m; see `Uplink.encode`. A link too thin for one entry leaves all of it in e_m."""
        target = update if held is None else update + held
        payload, able, bits = torch.zeros_like(target), torch.ones(len(devices), dtype=torch.bool), 0
        for row, device in enumerate(devices.tolist()):
            rounding = draws.generator("rounding", device)
            if self.levels is not None:
                payload[row] = quantize(target[row], self.levels, rounding)
                bits += message_bits(target.shape[1], self.levels)
                continue
            message = quantize_within(target[row], budget[row], rounding)
            if message is None:
                able[row] = False
            else:
                payload[row] = message.dense()
                bits += message.bits
        return Encoded(payload, target - payload, able, bits)

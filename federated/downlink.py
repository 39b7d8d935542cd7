"""Server → devices: what each device takes the parameters to be, θ̂_m, and what that cost.

| downlink | what travels | who remembers |
|---|---|---|
| `IdealDownlink` | θ, exactly | nobody |
| `DigitalDownlink` | Q(θ − θ̂) at the common rate that every device decodes [NOISY] | one θ̂, the same everywhere |
| `AnalogDownlink` | θ uncoded; each device scales what it hears (MMSE) [NOISY] | nobody |
| `SelectionDownlink` | Q(θ − θ̂_m) to each of the J devices with the best channels [SELECT] | θ̂_m of every device |

[NOISY] arXiv 2008.11141, [SELECT] arXiv 2107.03510. Each class says what its paper gives and what is ours.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from federated.arguments import instance
from federated.channel import Channel, energy, pack, unpack
from federated.draws import Draws
from federated.quantize import Quantized, quantize_within
from sgc.checks import whole

Memory = Tensor | None


@dataclass
class Traffic:
    """What a link used in a round.

    Args:
        bits: of all messages; None where nothing is coded.
        channel_uses: complex symbols, T·F.
        power: mean transmit power per OFDM symbol, over the senders that sent.
        silent: devices that wanted to be served, or to send, and could not.
    """

    bits: int | None = None
    channel_uses: int = 0
    power: float = 0.0
    silent: int = 0


@dataclass
class DownlinkRound:
    """One round of a downlink: whom it serves, and what each device receives.

    Args:
        devices: (J,) int64, those that are served.
        traffic: what was used.
        messages: what digital links send, by device: it moves the θ̂_m that the device holds, whether it is served or
            only listens.
    """

    devices: Tensor
    traffic: Traffic = field(default_factory=Traffic)
    messages: dict[int, Quantized] = field(default_factory=dict)

    def receive(self, devices: Tensor) -> Tensor:
        """Return θ̂_m of some served devices (B,) as (B, d) fp32, not to be written to."""
        raise NotImplementedError  # as it is, this class is the round that served nobody: there is nothing to receive


class Downlink(abc.ABC):
    """Sends θ to the devices, once a round."""

    def memory_rows(self, num_devices: int) -> int:
        """Count the rows (each of d numbers) that must be remembered between rounds: 0, 1 or M."""
        return 0

    @abc.abstractmethod
    def send(self, theta: Tensor, asked: Tensor, num_devices: int, memory: Memory, draws: Draws) -> DownlinkRound:
        """Send θ.

        Args:
            theta: θ (d,) fp32.
            asked: (·,) int64, the devices that the server asks to take part.
            num_devices: M, all that listen.
            memory: θ̂ (rows, d), written in place, or None.
            draws: of this link in this round.
        """


class _SharedRound(DownlinkRound):
    """Every device holds the same vector."""

    def __init__(self, value: Tensor, devices: Tensor, traffic: Traffic) -> None:
        super().__init__(devices, traffic)
        self.value = value

    def receive(self, devices: Tensor) -> Tensor:
        return self.value.expand(len(devices), -1)


class IdealDownlink(Downlink):
    """Every device receives θ without error and without cost."""

    def send(self, theta: Tensor, asked: Tensor, num_devices: int, memory: Memory, draws: Draws) -> DownlinkRound:
        """Send θ as it is; see `Downlink.send`."""
        return _SharedRound(theta, asked, Traffic())


class DigitalDownlink(Downlink):
    """Q(θ − θ̂) at a common rate, decoded by every device; the server knows θ̂. [NOISY]

    Bits of a round: T·min_m Σ_f log2(1 + P|h_{m,f}|²/(Fσ²)), equal power over subchannels (ours).

    Args:
        channel: with a budget of `ofdm_symbols`.

    Raises:
        ValueError: the channel has no budget.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = instance("channel", channel, Channel)
        self.symbols = _symbols_of(channel)

    def memory_rows(self, num_devices: int) -> int:
        """Return 1: one θ̂ for all."""
        return 1

    def send(self, theta: Tensor, asked: Tensor, num_devices: int, memory: Memory, draws: Draws) -> DownlinkRound:
        """Move θ̂ by the quantized difference; see `Downlink.send`. A link too thin for one entry serves nobody."""
        assert memory is not None
        rates = capacities(self.channel, range(num_devices), self.symbols, draws)
        message = quantize_within(theta - memory[0], whole_bits(float(rates.min())), draws.generator("rounding"))
        if message is None:
            return DownlinkRound(asked[:0], Traffic(bits=0, silent=len(asked)))
        memory[0] += message.dense()
        traffic = Traffic(message.bits, self.symbols * self.channel.subchannels, self.channel.power)
        round_ = _SharedRound(memory[0], asked, traffic)
        round_.messages = dict.fromkeys(range(num_devices), message)
        return round_


class AnalogDownlink(Downlink):
    """θ uncoded: device m hears α·h_m∘x + z_m and scales it to the least mean squared error. [NOISY; scaling: ours]

    α = √(T·P/‖x‖²) is known to the devices. The estimate of a symbol of mean energy E_x = T·P/(number of symbols) is
    conj(h)·E_x/(|h|²E_x + σ²)·y/α, with mean squared error E_x·σ²/(|h|²E_x + σ²)/α². (Plain inversion has infinite
    noise variance under Rayleigh fading.)

    Args:
        channel: whose budget, if it has one, must hold θ.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = instance("channel", channel, Channel)

    def send(self, theta: Tensor, asked: Tensor, num_devices: int, memory: Memory, draws: Draws) -> DownlinkRound:
        """Broadcast θ; see `Downlink.send`."""
        symbols = self.channel.symbols_for(len(theta))
        return _BroadcastRound(self.channel, theta, symbols, asked, draws)


class _BroadcastRound(DownlinkRound):
    """Every device hears θ through gains and noise of its own, drawn when it receives."""

    def __init__(self, channel: Channel, theta: Tensor, symbols: int, devices: Tensor, draws: Draws) -> None:
        self.channel, self.draws, self.size = channel, draws, len(theta)
        x = pack(theta[None], channel.subchannels)
        norm_squared = float(energy(x))
        self.alpha = math.sqrt(symbols * channel.power / norm_squared) if norm_squared else 0.0
        self.sent = (self.alpha * x.to(torch.complex128)).to(torch.complex64)  # α of a tiny θ is beyond fp32
        self.symbol_energy = symbols * channel.power / math.ceil(self.size / 2)
        power = channel.power if norm_squared else 0.0
        super().__init__(devices, Traffic(None, symbols * channel.subchannels, power))

    def receive(self, devices: Tensor) -> Tensor:
        if not self.alpha:  # nothing was sent: θ is zero
            return torch.zeros(self.size).expand(len(devices), -1)
        symbols = self.sent.shape[1]
        gains = self.channel.gains(devices.tolist(), symbols, self.draws)[:, 0]
        heard = gains * self.sent
        for row, device in enumerate(devices.tolist()):
            heard[row] += self.channel.noise(heard.shape[1:], self.draws.generator("noise", device))
        estimate = mmse(heard, gains, self.symbol_energy, self.channel.noise_variance) / self.alpha
        return unpack(estimate, self.size)


class SelectionDownlink(Downlink):
    """The J devices with the best channels each get a quantized difference to their own last estimate. [SELECT]

    Ours: the best are those of highest rate Σ_f log2(1 + P|h_{m,f}|²/(Fσ²)), or of its limit without noise, and chance
    decides among equals; each gets T/J of the OFDM symbols (whole ones, the first get what is left over); a link too
    thin for one entry serves nobody. Who is not selected keeps θ̂_m.

    Args:
        channel: with a budget of `ofdm_symbols`.
        participants: J.

    Raises:
        ValueError: J below 1, or the channel has no budget.
    """

    def __init__(self, channel: Channel, participants: int) -> None:
        self.channel = instance("channel", channel, Channel)
        self.symbols = _symbols_of(channel)
        self.participants: int = whole("participants", participants, at_least=1)

    def memory_rows(self, num_devices: int) -> int:
        """Return M: θ̂_m of every device; raise ValueError where fewer are there than are selected."""
        if self.participants > num_devices:
            raise ValueError(f"participants must be at most num_devices={num_devices}, got {self.participants}")
        return num_devices

    def send(self, theta: Tensor, asked: Tensor, num_devices: int, memory: Memory, draws: Draws) -> DownlinkRound:
        """Select, and move the selected devices' θ̂_m; see `Downlink.send`."""
        assert memory is not None
        quality = over_devices(self.channel.quality, self.channel, asked.tolist(), self.symbols, draws)
        equals = torch.randperm(len(asked), generator=draws.generator("equals"))
        best = equals[quality[equals].argsort(descending=True, stable=True)][: self.participants].sort().values
        selected, shares = asked[best].tolist(), split_symbols(self.symbols, len(best))
        rates = capacities(self.channel, selected, self.symbols, draws).tolist()
        messages: dict[int, Quantized] = {}
        for device, bits in zip(selected, budgets(rates, shares, self.symbols), strict=True):
            message = self.message(theta, memory[device], bits, draws, device)
            if message is not None:
                memory[device] += message.dense()
                messages[device] = message
        traffic = Traffic(sum(message.bits for message in messages.values()), silent=len(best) - len(messages))
        if messages:
            traffic.channel_uses, traffic.power = self.symbols * self.channel.subchannels, self.channel.power
        return _RememberedRound(memory, messages, traffic)

    def message(self, theta: Tensor, held: Tensor, bits: float, draws: Draws, device: int) -> Quantized | None:
        """Quantize θ − θ̂_m into what one device's share carries."""
        return quantize_within(theta - held, bits, draws.generator("rounding", device))


class _RememberedRound(DownlinkRound):
    """Every device has its own row of the memory."""

    def __init__(self, memory: Tensor, messages: dict[int, Quantized], traffic: Traffic) -> None:
        super().__init__(torch.tensor(list(messages), dtype=torch.int64), traffic, messages)
        self.memory = memory

    def receive(self, devices: Tensor) -> Tensor:
        return self.memory[devices]


def mmse(heard: Tensor, gains: Tensor, symbol_energy: float, noise_variance: float) -> Tensor:
    """Estimate what was sent: conj(h)·E_x/(|h|²E_x + σ²)·y, with mean squared error E_x·σ²/(|h|²E_x + σ²).

    Args:
        heard: y = h∘x + z, complex.
        gains: h, of a shape that broadcasts.
        symbol_energy: E_x = E|x|².
        noise_variance: σ².
    """
    strength = gains.abs().square() + noise_variance / symbol_energy
    # without gain and noise nothing is heard, and the limit is 0
    return torch.where(strength > 0, gains.conj() * heard / strength, 0)


def capacities(channel: Channel, devices: Sequence[int], symbols: int, draws: Draws) -> Tensor:
    """Count the bits that the whole round would carry to each device (B,)."""
    return over_devices(channel.capacity, channel, devices, symbols, draws)


def over_devices(
    measure: Callable[[Tensor, int], Tensor], channel: Channel, devices: Sequence[int], symbols: int, draws: Draws
) -> Tensor:
    """Apply a measure of gains in a round to the gains of some devices (B,), a few of them at a time."""
    step = max(1, (1 << 20) // (symbols * channel.subchannels))
    parts = [devices[start : start + step] for start in range(0, len(devices), step)]
    return torch.cat([measure(channel.gains(part, symbols, draws), symbols) for part in parts])


def split_symbols(symbols: int, served: int) -> list[int]:
    """Split T OFDM symbols among J devices; the first get what is left over."""
    return [symbols // served + (j < symbols % served) for j in range(served)]


def budgets(rates: Sequence[float], shares: Sequence[int], symbols: int) -> list[float]:
    """Count the whole bits that devices' shares of T symbols carry, of what the whole round would; `inf` stays."""
    return [whole_bits(rate * own / symbols) if own else 0.0 for rate, own in zip(rates, shares, strict=True)]


def whole_bits(bits: float) -> float:
    """Round down to whole bits; `inf` stays."""
    return bits if math.isinf(bits) else math.floor(bits)


def _symbols_of(channel: Channel) -> int:
    """Return T; raise ValueError where the channel has no budget."""
    if channel.ofdm_symbols is None:
        raise ValueError("a digital link needs a budget: set the channel's ofdm_symbols")
    return channel.ofdm_symbols

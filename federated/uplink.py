"""Devices → server: the estimate of the weighted mean of the updates, Σ_m (B_m/B)·Δ_m, and what it cost.

| uplink | what travels | who remembers |
|---|---|---|
| `IdealUplink` | Δ_m, exactly | nobody |
| `QuantizedUplink` | Q(Δ_m + e_m) [LFL] | e_m, what quantization left out |
| `AnalogUplink` | Δ_m/h_m, silent where abs(h) < λ: truncated channel inversion [NOISY] | nobody |
| `BlindUplink` | Δ_m, no CSI at the devices; the server's N_r antennas combine [BLIND] | nobody |
| `SketchedUplink` | A·top_s(Δ_m + e_m), over an uncoded link [ADSGD, CADSGD; this form: ours] | e_m; a residual |

[LFL] arXiv 2006.10672, [NOISY] arXiv 2008.11141, [BLIND] arXiv 2010.10030, [ADSGD] arXiv 1901.00844, [CADSGD] arXiv
1907.09769. In a superposition every device scales by the same α = min_m √(T·P/‖x_m‖²), which the server knows.

What the devices send is added up as it comes, a few devices at a time, so a round needs memory for those and not for
all. Signals add up unscaled and noise joins at the end divided by α: the same numbers, since the channel is linear.

The server trusts nothing that it adds up: `Superposition.hear` checks it, for the simulator and for Flower.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from federated.arguments import chosen, instance
from federated.arguments import share as share_of_one
from federated.channel import Channel, MultipleAccess, energy, pack, unpack
from federated.downlink import Memory, Traffic, budgets, capacities, share
from federated.draws import Draws
from federated.quantize import message_bits, quantize, quantize_within
from federated.server import check_state, sound
from sgc.checks import rate, whole, word
from sgc.codec import Codec
from sgc.codec.layout import make_layout
from sgc.codec.project import Projection, check_projection
from sgc.codec.recover import METHODS
from sgc.codec.sparsify import top_entries


@dataclass
class Encoded:
    """What some devices made of their updates.

    Args:
        payload: (B, p) fp32, what is to be sent.
        held: (B, d) fp32, what each keeps for its next update, or None.
        able: (B,) bool, whose link holds a message at all.
        bits: of all messages, or None where nothing is coded.
    """

    payload: Tensor
    held: Tensor | None
    able: Tensor
    bits: int | None = None


class Superposition(abc.ABC):
    """One round of an uplink, opened: devices send, the server receives.

    Args:
        uplink: whose round it is.
        size: p, numbers a device sends.
        participants: J.
        memory: e (M, d), written in place, or None.
        draws: of this link in this round.
    """

    def __init__(self, uplink: Uplink, size: int, participants: int, memory: Memory, draws: Draws) -> None:
        self.uplink, self.size, self.participants, self.memory, self.draws = uplink, size, participants, memory, draws
        self.weight, self.senders = 0.0, 0
        self.traffic = Traffic()

    def send(self, devices: Tensor, update: Tensor, weight: Tensor, on_time: Tensor | None = None) -> Tensor:
        """Let some devices encode and send their updates, those that are `server.sound`.

        Args:
            devices: (B,) int64, each with its share of the link.
            update: Δ (B, d) fp32.
            weight: B_m (B,), any positive scale.
            on_time: (B,) bool, those that send; None: all. The others' shares stay unused.

        Returns:
            (B,) bool, whose updates were sent and could be added up.
        """
        budget, sent = self.budget(devices), sound(update, weight)
        if on_time is not None:
            sent &= on_time
        if not sent.all():
            budget = [bits for bits, sends in zip(budget, sent.tolist(), strict=True) if sends]
            devices, update, weight = devices[sent], update[sent], weight[sent]
        if not len(devices):
            return sent
        held = None if self.memory is None else self.memory[devices]
        encoded = self.uplink.encode(devices, update, held, budget, self.draws)
        if self.memory is not None and encoded.held is not None:
            self.memory[devices] = encoded.held
        return sent.masked_scatter(sent, self.hear(devices, encoded, weight))

    def hear(self, devices: Tensor, encoded: Encoded, weight: Tensor) -> Tensor:
        """Take in what some devices send, and leave out what can't be added up.

        Args:
            devices: (B,) int64.
            encoded: what they made of their updates.
            weight: B_m (B,).

        Returns:
            (B,) bool, whose payloads are `server.sound`.

        Raises:
            ValueError: payloads of another size or type than the link carries.
        """
        payload = encoded.payload
        if payload.shape != (len(devices), self.size) or payload.dtype != torch.float32:
            got = f"{payload.dtype} {tuple(payload.shape)}"
            raise ValueError(f"payloads must be torch.float32 {(len(devices), self.size)}, got {got}")
        heard = sound(payload, weight)
        able = encoded.able & heard
        if encoded.bits is not None:
            self.traffic.bits = (self.traffic.bits or 0) + encoded.bits
        self.traffic.silent += int((~encoded.able & heard).sum())
        if able.any():
            self.weight += float(weight[able].double().sum())
            self.senders += int(able.sum())
            if able.all():
                self.add(devices, encoded.payload, weight)
            else:
                self.add(devices[able], encoded.payload[able], weight[able])
        return heard

    def budget(self, devices: Tensor) -> list[float]:
        """Give the bits that each device's link holds."""
        return [math.inf] * len(devices)

    @abc.abstractmethod
    def add(self, devices: Tensor, payload: Tensor, weight: Tensor) -> None:
        """Add some devices' payloads (B, p) to what is received."""

    def receive(self) -> Tensor | None:
        """Estimate the weighted mean of what was sent; None where nobody was heard, or noise is beyond fp32."""
        estimate = self.estimate()
        return estimate if estimate is not None and bool(estimate.isfinite().all()) else None

    @abc.abstractmethod
    def estimate(self) -> Tensor | None:
        """Do the work of `receive`, finite or not."""


class Uplink(abc.ABC):
    """Brings the mean of the updates to the server, once a round."""

    def memory_rows(self, num_devices: int) -> int:
        """Count the rows (each of d numbers) that devices remember between rounds: 0 or M."""
        return 0

    def state(self) -> dict[str, Tensor]:
        """Give what the server remembers of this link between rounds."""
        return {}

    def load_state(self, state: dict[str, Tensor], size: int) -> None:
        """Take back what `state` gave, for d = size.

        Raises:
            ValueError: something this link does not remember.
        """
        check_state(state, {})

    def encode(
        self, devices: Tensor, update: Tensor, held: Tensor | None, budget: list[float], draws: Draws
    ) -> Encoded:
        """Do the devices' part: what they send, and what they keep.

        Args:
            devices: (B,) int64.
            update: Δ (B, d).
            held: e (B, d), or None.
            budget: bits of each device's link.
            draws: of this link in this round.
        """
        return Encoded(update, held, torch.ones(len(devices), dtype=torch.bool))

    @abc.abstractmethod
    def open(self, size: int, participants: int, memory: Memory, draws: Draws) -> Superposition:
        """Open a round.

        Args:
            size: d.
            participants: J, at least 1.
            memory: e (M, d), written in place, or None.
            draws: of this link in this round.
        """


class IdealUplink(Uplink):
    """The server receives every update without error and without cost."""

    def open(self, size: int, participants: int, memory: Memory, draws: Draws) -> Superposition:
        """Open a round; see `Uplink.open`."""
        return _Sum(self, size, participants, memory, draws)


class _Sum(Superposition):
    """The weighted mean itself."""

    def __init__(self, uplink: Uplink, size: int, participants: int, memory: Memory, draws: Draws) -> None:
        super().__init__(uplink, size, participants, memory, draws)
        self.sum = torch.zeros(size)

    def add(self, devices: Tensor, payload: Tensor, weight: Tensor) -> None:
        self.sum += weight.float() @ payload

    def estimate(self) -> Tensor | None:
        return self.sum / self.weight if self.weight else None


class QuantizedUplink(Uplink):
    """Every device sends its update quantized, and adds what that left out to its next. [LFL]

    Args:
        levels: q of an error-free link of as many bits as that takes; None: what the channel carries decides.
        channel: gives each of the J devices T/J OFDM symbols at Σ_f log2(1 + P|h_{m,f}|²/(Fσ²)) bits (ours); the j
            largest entries go at q levels, chosen for the least error.

    Raises:
        ValueError: not exactly one of the two, levels below 1, or a channel without a budget.
    """

    def __init__(self, levels: int | None = None, channel: Channel | None = None) -> None:
        if (levels is None) == (channel is None):
            raise ValueError(f"give either levels or channel, got levels={levels!r} and channel={channel!r}")
        if channel is not None and instance("channel", channel, Channel).ofdm_symbols is None:
            raise ValueError("a digital link needs a budget: set the channel's ofdm_symbols")
        self.levels: int | None = whole("levels", levels, at_least=1, optional=True)
        self.channel = channel

    def memory_rows(self, num_devices: int) -> int:
        """e_m of every device."""
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

    def open(self, size: int, participants: int, memory: Memory, draws: Draws) -> Superposition:
        """Open a round; see `Uplink.open`."""
        return _Digital(self, size, participants, memory, draws)


class _Digital(_Sum):
    """Messages decoded one by one."""

    uplink: QuantizedUplink

    def __init__(self, uplink: Uplink, size: int, participants: int, memory: Memory, draws: Draws) -> None:
        super().__init__(uplink, size, participants, memory, draws)
        channel = self.uplink.channel
        if channel is not None:
            symbols = channel.ofdm_symbols or 0
            self.shares = share(symbols, participants)
            self.asked = 0
            self.traffic.channel_uses, self.traffic.power = symbols * channel.subchannels, channel.power

    def budget(self, devices: Tensor) -> list[float]:
        channel = self.uplink.channel
        if channel is None:
            return super().budget(devices)
        symbols = channel.ofdm_symbols or 0
        rates = capacities(channel, devices.tolist(), symbols, self.draws).tolist()
        shares = self.shares[self.asked : self.asked + len(devices)]
        self.asked += len(devices)
        return budgets(rates, shares, symbols)


class AnalogUplink(Uplink):
    """Truncated channel inversion: Δ_m/h_m where |h_m| ≥ λ, else silence; the channel adds. [NOISY]

    The server divides by the number of active devices on each subchannel; one that nobody uses gives 0.

    Args:
        channel: of one antenna.
        threshold: λ.

    Raises:
        ValueError: a negative λ, or more than one antenna.
    """

    def __init__(self, channel: MultipleAccess, threshold: float = 0.0) -> None:
        if instance("channel", channel, MultipleAccess).antennas != 1:
            raise ValueError(f"channel inversion is for antennas=1, got {channel.antennas}")
        self.channel, self.threshold = channel, rate("threshold", threshold)

    def open(self, size: int, participants: int, memory: Memory, draws: Draws) -> Superposition:
        """Open a round; see `Uplink.open`."""
        return _Inversion(self, size, participants, memory, draws)


class _OverTheAir(Superposition):
    """What the uncoded links have in common: energies, the common α, power."""

    def __init__(
        self,
        uplink: Uplink,
        channel: MultipleAccess,
        size: int,
        participants: int,
        memory: Memory,
        draws: Draws,
    ) -> None:
        super().__init__(uplink, size, participants, memory, draws)
        self.channel, self.symbols = channel, channel.symbols_for(size)
        self.most, self.total, self.active_devices = 0.0, 0.0, 0
        self.traffic.channel_uses = self.symbols * channel.subchannels

    def count_energy(self, sent: Tensor, active: Tensor) -> None:
        """Note ‖x_m‖² of what some devices send (B, T, F), of whom some (B,) are active."""
        energies = energy(sent)
        self.most, self.total = max(self.most, float(energies.max())), self.total + float(energies.sum())
        self.active_devices += int(active.sum())
        self.traffic.silent += int((~active).sum())

    def noise_over_alpha(self, shape: tuple[int, ...]) -> Tensor:
        """Draw z/α, and note the mean transmit power that α means."""
        if not self.most:  # nothing to send: silence is understood
            return torch.zeros(shape, dtype=torch.complex64)
        alpha = math.sqrt(self.symbols * self.channel.power / self.most)
        self.traffic.power = alpha**2 * self.total / self.symbols / self.active_devices
        return self.channel.noise(shape, self.draws.generator("noise")) / alpha


class _Inversion(_OverTheAir):
    def __init__(self, uplink: AnalogUplink, size: int, participants: int, memory: Memory, draws: Draws) -> None:
        super().__init__(uplink, uplink.channel, size, participants, memory, draws)
        self.threshold = uplink.threshold
        self.heard = torch.zeros(self.symbols, self.channel.subchannels, dtype=torch.complex64)
        self.active = torch.zeros(self.symbols, self.channel.subchannels)

    def add(self, devices: Tensor, payload: Tensor, weight: Tensor) -> None:
        x = pack(weight.float()[:, None] * payload, self.channel.subchannels)
        gains = self.channel.gains(devices.tolist(), self.symbols, self.draws)[:, 0]
        strong = (gains.abs() >= self.threshold) & (gains != 0)
        sent = torch.where(strong, x / gains, 0)
        self.count_energy(sent, strong.any(2).any(1))
        self.heard += torch.where(strong, x, 0).sum(0)  # h·(x/h)
        self.active += strong.sum(0)

    def estimate(self) -> Tensor | None:
        if not self.active_devices:
            return None
        heard = self.heard + self.noise_over_alpha(self.heard.shape)
        mean = torch.where(self.active > 0, heard / self.active.clamp_min(1), 0)
        return unpack(mean[None], self.size)[0] * (self.senders / self.weight)


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

    def __init__(self, channel: MultipleAccess) -> None:
        if instance("channel", channel, MultipleAccess).fading == "none":
            raise ValueError("the blind uplink needs gains that fade independently, got fading='none'")
        self.channel = channel

    def open(self, size: int, participants: int, memory: Memory, draws: Draws) -> Superposition:
        """Open a round; see `Uplink.open`."""
        return _Blind(self, size, participants, memory, draws)


class _Blind(_OverTheAir):
    def __init__(self, uplink: BlindUplink, size: int, participants: int, memory: Memory, draws: Draws) -> None:
        super().__init__(uplink, uplink.channel, size, participants, memory, draws)
        antennas, subchannels = self.channel.antennas, self.channel.subchannels
        fresh = self.symbols if self.channel.fading == "iid" else 1
        self.heard = torch.zeros(antennas, self.symbols, subchannels, dtype=torch.complex64)
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
                self.heard += torch.einsum("baf,btf->atf", gains[:, :, 0], x[part])
            else:
                self.heard += torch.einsum("batf,btf->atf", gains, x[part])

    def estimate(self) -> Tensor | None:
        if not self.senders:
            return None
        heard = self.heard + self.noise_over_alpha(self.heard.shape)
        csi_error = torch.randn(self.gains.shape, generator=self.draws.generator("csi"), dtype=torch.complex64)
        known = self.gains + csi_error * math.sqrt(self.channel.csi_error_variance)
        combined = (known.conj() * heard).mean(0)
        return unpack(combined[None], self.size)[0] / (self.weight * self.channel.gain_variance)


def blind_error(channel: MultipleAccess, signal_energy: Tensor, num_devices: int, alpha: float) -> Tensor:
    """Give the blind uplink's E|err|² per complex symbol, in closed form. [BLIND; derived in docs/federated.md]

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


class SketchedUplink(Uplink):
    """Devices send sketches of their updates; the link adds them; the server decodes the sum once. [ours in this form]

    Device m sends A·top_s(Δ_m + e_m), chunk by chunk, and e_m keeps what sparsification dropped. Supports differ
    between devices, so the server recovers s' > s entries of each chunk. A depends on the seed alone: a projection made
    from the data (double compression's basis) differs between devices, and has no place here.

    Args:
        over: the uncoded link that the sketches cross.
        chunk_size: n; None: all of an update.
        sketch_size: k, numbers sent per chunk.
        sparsity: s, entries each device keeps of a chunk.
        recovered: s', at most k; default 2·s within k.
        residual: ρ; the server keeps in the sketch what was received and not yet recovered, E ← ρE + y − A·u. 0: it
            keeps nothing.
        method: of recovery.
        seed: of A.

    Raises:
        TypeError: `over` codes what it sends.
        ValueError: a size or ρ out of range.
    """

    def __init__(
        self,
        over: Uplink,
        *,
        chunk_size: int | None = 1024,
        sketch_size: int = 256,
        sparsity: int = 32,
        recovered: int | None = None,
        residual: float = 0.0,
        method: str = "omp",
        seed: int = 0,
    ) -> None:
        if isinstance(instance("over", over, Uplink), QuantizedUplink | SketchedUplink):
            raise TypeError(f"sketches cross an uncoded link, got {type(over).__name__}")
        self.codec = Codec(chunk_size, sketch_size, sparsity, seed)
        self.projection = Projection(self.codec.sketch_size, self.codec.seed)
        most = self.codec.sketch_size
        self.recovered = chosen("recovered", recovered, most, whole_of="sketch_size") or min(2 * sparsity, most)
        self.over, self.rho = over, share_of_one("residual", residual, most=True)
        self.method = word("method", method, METHODS)
        self.residual: Tensor | None = None

    def memory_rows(self, num_devices: int) -> int:
        """e_m of every device."""
        return num_devices

    def state(self) -> dict[str, Tensor]:
        """Give the residual E (c, k)."""
        return {} if self.residual is None else {"residual": self.residual}

    def load_state(self, state: dict[str, Tensor], size: int) -> None:
        """Take back E; raises ValueError for one of another size or type."""
        if state:  # before the first update was heard there is no residual
            check_state(state, {"residual": self.sketch_shape(size)} if self.rho else {})
        self.residual = state.get("residual")

    def sketch(self, x: Tensor, sparsity: int) -> tuple[Tensor, Tensor]:
        """Sparsify and project some vectors.

        Args:
            x: (B, d).
            sparsity: entries kept of each chunk.

        Returns:
            The sketches (B, c·min(k, n)), and the sparse vectors (B, d) that they are of.
        """
        layout = make_layout((x.shape[1],), self.codec.chunk_size)
        check_projection(layout.chunk, self.codec.sketch_size)
        missing = layout.chunks * layout.chunk - x.shape[1]
        chunks = torch.nn.functional.pad(x, (0, missing)).view(-1, layout.chunk)
        index, value = top_entries(chunks, sparsity)
        sketch = self.projection.project(index, value, layout.chunk)
        sparse = torch.zeros_like(chunks).scatter_(1, index, value)
        return sketch.view(len(x), -1), sparse.view(len(x), -1)[:, : x.shape[1]]

    def sketch_shape(self, size: int) -> tuple[int, int]:
        """Give (c, min(k, n)) for d numbers."""
        layout = make_layout((size,), self.codec.chunk_size)
        return layout.chunks, min(self.codec.sketch_size, layout.chunk)

    def encode(
        self, devices: Tensor, update: Tensor, held: Tensor | None, budget: list[float], draws: Draws
    ) -> Encoded:
        """Sketch Δ_m + e_m; see `Uplink.encode`."""
        target = update if held is None else update + held
        sketch, sparse = self.sketch(target, self.codec.sparsity)
        return Encoded(sketch, target - sparse, torch.ones(len(devices), dtype=torch.bool))

    def decode(self, sketch: Tensor, size: int) -> Tensor:
        """Recover the update (d,) from the mean of the sketches (c, k), and move the residual."""
        if self.rho and self.residual is not None:
            sketch = sketch + self.rho * self.residual
        update = self.codec.decode(sketch, (size,), sparsity=self.recovered, method=self.method)
        if self.rho:
            self.residual = sketch - self.sketch(update[None], self.recovered)[0].view_as(sketch)
        return update

    def open(self, size: int, participants: int, memory: Memory, draws: Draws) -> Superposition:
        """Open a round; see `Uplink.open`."""
        return _Sketched(self, size, participants, memory, draws)


class _Sketched(Superposition):
    uplink: SketchedUplink

    def __init__(self, uplink: SketchedUplink, size: int, participants: int, memory: Memory, draws: Draws) -> None:
        super().__init__(uplink, size, participants, memory, draws)
        self.shape = uplink.sketch_shape(size)
        self.inner = uplink.over.open(math.prod(self.shape), participants, None, draws)

    def hear(self, devices: Tensor, encoded: Encoded, weight: Tensor) -> Tensor:
        return self.inner.hear(devices, encoded, weight)

    def add(self, devices: Tensor, payload: Tensor, weight: Tensor) -> None:
        self.inner.add(devices, payload, weight)

    def estimate(self) -> Tensor | None:
        sketch = self.inner.receive()
        self.traffic = self.inner.traffic
        return None if sketch is None else self.uplink.decode(sketch.view(self.shape), self.size)


def sketch_size_that_fits(size: int, chunk_size: int, channel: Channel) -> int:
    """Give the largest k whose sketches of d numbers fit the channel's budget of T·F complex symbols a round.

    Raises:
        ValueError: no budget, or one that does not hold one number per chunk.
    """
    if channel.ofdm_symbols is None:
        raise ValueError("sketches are fitted to a budget: set the channel's ofdm_symbols")
    layout = make_layout((size,), chunk_size)
    numbers = 2 * channel.ofdm_symbols * channel.subchannels
    if numbers < layout.chunks:
        raise ValueError(f"a budget of {numbers} numbers does not hold one for each of {layout.chunks} chunks")
    return min(numbers // layout.chunks, layout.chunk)

"""The radio: power, noise, gains, and how real vectors become OFDM symbols.

Shapes and units. A round of a link has T OFDM symbols of F subchannels: T·F complex symbols, "channel uses". Power P is
the mean over the OFDM symbols of a round of Σ_f |x_f|². Noise is CN(0, σ²) per complex symbol; gains are CN(0, σ_h²),
i.i.d. over devices, antennas and subchannels. Mean SNR of a subchannel: P·σ_h²/(F·σ²), in dB.

| channel | here |
|---|---|
| fading broadcast | `Channel`: one sender, every device has gains of its own |
| fading multiple access (MAC) | `MultipleAccess`: signals add up at a server with N_r antennas and imperfect CSI |
| AWGN | either of them with `fading="none"`: every gain is 1 |
| ideal | no channel: `IdealDownlink`, `IdealUplink` |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from federated.arguments import positive
from federated.draws import Draws
from sgc.checks import plain, rate, shown, whole, word

FADING = ("block", "iid", "none")
MOST_DB = 300.0  # beyond, fp32 holds no signal beside the noise


def check_snr(name: str, value: Any) -> float:
    """Return an SNR in dB as a float, `inf` for no noise.

    Raises:
        TypeError: it is no number.
        ValueError: no channel has it.
    """
    given = plain(value)
    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    found = float(given)
    if not (abs(found) <= MOST_DB or found == math.inf):
        raise ValueError(f"{name} must be in [-{MOST_DB:.0f}, {MOST_DB:.0f}], or inf for no noise, got {shown(value)}")
    return found


@dataclass(frozen=True, kw_only=True)
class Channel:
    """A fading broadcast channel, and what every radio link has.

    Args:
        power: P, mean transmit power per OFDM symbol.
        noise_variance: σ², per complex symbol at the receiver.
        subchannels: F.
        ofdm_symbols: T, the budget of a round; None: as many as an analog scheme needs.
        gain_variance: σ_h².
        fading: "block": gains hold for a round; "iid": they are new in every OFDM symbol; "none": they are 1 (AWGN).

    Raises:
        ValueError: a value out of range.
        TypeError: a value that is no number.

    Example:
        >>> Channel.from_snr(10.0, power=2.0, subchannels=4).noise_variance
        0.05
    """

    power: float = 1.0
    noise_variance: float = 1.0
    subchannels: int = 1
    ofdm_symbols: int | None = None
    gain_variance: float = 1.0
    fading: str = "block"

    def __post_init__(self) -> None:
        self._hold(
            power=positive("power", self.power),
            noise_variance=rate("noise_variance", self.noise_variance),
            subchannels=whole("subchannels", self.subchannels, at_least=1),
            ofdm_symbols=whole("ofdm_symbols", self.ofdm_symbols, at_least=1, optional=True),
            gain_variance=positive("gain_variance", self.gain_variance),
            fading=word("fading", self.fading, FADING),
        )

    def _hold(self, **checked: Any) -> None:
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_snr(cls, snr_db: float, **arguments: Any) -> Self:
        """Make a channel by its mean SNR per subchannel instead of its noise variance.

        Args:
            snr_db: 10·log10(P·σ_h²/(F·σ²)), `inf` for no noise.
            arguments: all but noise_variance.

        Raises:
            ValueError: an SNR that no channel has.
        """
        snr_db = check_snr("snr_db", snr_db)
        channel = cls(noise_variance=0.0, **arguments)
        mean_power = channel.power * channel.mean_gain / channel.subchannels
        return replace(channel, noise_variance=mean_power / 10 ** (snr_db / 10))

    @property
    def mean_gain(self) -> float:
        """E|h|²."""
        return 1.0 if self.fading == "none" else self.gain_variance

    @property
    def snr_db(self) -> float:
        """Mean SNR of a subchannel in dB."""
        if self.noise_variance == 0:
            return math.inf
        return 10 * math.log10(self.power * self.mean_gain / (self.subchannels * self.noise_variance))

    def symbols_for(self, size: int) -> int:
        """Count the OFDM symbols that `size` real numbers need.

        Raises:
            ValueError: more than the budget.
        """
        needed = math.ceil(math.ceil(size / 2) / self.subchannels)
        if self.ofdm_symbols is not None and needed > self.ofdm_symbols:
            raise ValueError(
                f"{size} uncoded numbers need {needed} OFDM symbols of {self.subchannels} subchannels, above the "
                f"budget of ofdm_symbols={self.ofdm_symbols}; send sketches, or raise the budget"
            )
        return needed

    def gains(self, devices: Sequence[int], symbols: int, draws: Draws, antennas: int = 1) -> Tensor:
        """Draw the gains of some devices.

        Args:
            devices: B device numbers; a device's gains depend on its number and on `draws` alone.
            symbols: T.
            draws: of this link in this round.
            antennas: N_r.

        Returns:
            h (B, N_r, T, F) complex64, with T of size 1 where the gains hold for the round.
        """
        shape = (antennas, symbols if self.fading == "iid" else 1, self.subchannels)
        if self.fading == "none":
            return torch.ones((1, *shape), dtype=torch.complex64).expand(len(devices), *shape)
        gains = torch.empty((len(devices), *shape), dtype=torch.complex64)
        for row, device in enumerate(devices):
            torch.randn(shape, generator=draws.generator("gains", int(device)), out=gains[row], dtype=torch.complex64)
        return gains.mul_(math.sqrt(self.gain_variance))

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw noise CN(0, σ²) of any shape, complex64."""
        noise = torch.randn(tuple(shape), generator=generator, dtype=torch.complex64)
        return noise.mul_(math.sqrt(self.noise_variance))

    def capacity(self, gains: Tensor, symbols: int) -> Tensor:
        """Count the bits that error-free coding carries: Σ_t Σ_f log2(1 + P·|h|²/(F·σ²)), equal power. (ours)

        Args:
            gains: (B, 1, 1 or T, F).
            symbols: T.

        Returns:
            (B,) float64; without noise `inf`, and 0 of a channel that carries nothing.
        """
        strength = gains.abs().double().square()
        if self.noise_variance == 0:
            return torch.where(strength.sum((1, 2, 3)) > 0, math.inf, 0.0)
        return _in_a_round(torch.log2(1 + strength * (self.power / (self.subchannels * self.noise_variance))), symbols)

    def quality(self, gains: Tensor, symbols: int) -> Tensor:
        """Rate channels, to compare devices by: their capacity, and without noise its limit. (ours)

        All capacities grow alike as the noise fades: what is left between two devices is Σ_t Σ_f log2|h|².

        Args:
            gains: (B, 1, 1 or T, F).
            symbols: T.

        Returns:
            (B,) float64, −inf of a channel that carries nothing.
        """
        if self.noise_variance > 0:
            return self.capacity(gains, symbols)
        return _in_a_round(2 * torch.log2(gains.abs().double()), symbols)


@dataclass(frozen=True, kw_only=True)
class MultipleAccess(Channel):
    """A fading MAC: what the devices send adds up at every antenna of the server.

    Args:
        antennas: N_r.
        csi_error_variance: σ̃², of what the server knows of Σ_m h_{m,a}.
    """

    antennas: int = 1
    csi_error_variance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._hold(
            antennas=whole("antennas", self.antennas, at_least=1),
            csi_error_variance=rate("csi_error_variance", self.csi_error_variance),
        )


def _in_a_round(bits: Tensor, symbols: int) -> Tensor:
    """Sum (B, 1, 1 or T, F) over subchannels and the T symbols of a round: (B,)."""
    bits = bits.sum(-1)[:, 0]
    return bits[:, 0] * symbols if bits.shape[1] == 1 else bits[:, :symbols].sum(1)


def pack(x: Tensor, subchannels: int) -> Tensor:
    """Pack real vectors into complex OFDM symbols: the first half is the real part, the second the imaginary one.

    Args:
        x: (B, d) fp32.
        subchannels: F.

    Returns:
        (B, T, F) complex64 with T = ⌈⌈d/2⌉/F⌉; what is left over is 0.
    """
    half = math.ceil(x.shape[1] / 2)
    symbols = math.ceil(half / subchannels)
    packed = torch.zeros(x.shape[0], symbols * subchannels, dtype=torch.complex64)
    packed.real[:, :half] = x[:, :half]
    packed.imag[:, : x.shape[1] - half] = x[:, half:]
    return packed.view(-1, symbols, subchannels)


def unpack(symbols: Tensor, size: int) -> Tensor:
    """Undo `pack`: (B, T, F) complex → (B, size) fp32."""
    half = math.ceil(size / 2)
    flat = symbols.reshape(symbols.shape[0], -1)
    return torch.cat([flat.real[:, :half], flat.imag[:, : size - half]], dim=1)


def energy(symbols: Tensor) -> Tensor:
    """Sum |x|² over the symbols of each sender: (B, T, F) → (B,) float64."""
    return torch.view_as_real(symbols).double().square().sum((1, 2, 3))

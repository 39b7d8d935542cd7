"""Noise for a seller's answer: the Gaussian mechanism, its sensitivity bounded by clipping and never read off the data.

Every row is scaled down to norm ≤ `clip` before it counts. Along orthonormal directions a row x adds to the answer
f(x) = (Vᵀx, upper triangle of (Vᵀx)(Vᵀx)ᵀ with √2 off the diagonal, ‖x‖²), each part scaled so that its norm is at most
1: by 1/C, 1/C² and 1/C². Replacing one of n rows moves the mean of f by at most 3/(√2·n), whatever the rows are: with
a = Vᵀx/C, b = Vᵀx'/C, c = a·b, s = ‖b‖² and ‖x'‖ the smaller of the two,

‖f(x) − f(x')‖² ≤ [‖a‖² + ‖a‖⁴] + [s + s² + (1 − s)²] + [−2c − 2c²] ≤ 2 + 2 + 1/2,

which unit rows with a·b = −1/2 attain, whether or not the energy is released. The number of rows is public.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from federated.arguments import positive, share
from federated.files import check_folder
from federated.market.fingerprint import Encoder
from federated.market.messages import BuyerQuery, SellerResponse
from federated.market.moments import Moments
from federated.market.query import collect, normal
from federated.market.untrusted import parse, printable, read_file, write_whole

SENSITIVITY = 3 / math.sqrt(2)  # of the sum of f over rows, replacing one


def gaussian_delta(epsilon: float, ratio: float) -> float:
    """Compute δ of the Gaussian mechanism at ε (Balle and Wang 2018, theorem 8): exact.

    Args:
        epsilon: not negative.
        ratio: μ, sensitivity over the noise's standard deviation.
    """
    if ratio == 0:
        return 0.0
    a, b = ratio / 2 - epsilon / ratio, -ratio / 2 - epsilon / ratio
    # e^ε·Φ(b) by logarithm: ε may be large where Φ(b) is tiny
    log_phi = _log_normal_cdf(b)
    return max(0.0, _normal_cdf(a) - math.exp(min(0.0, epsilon + log_phi)))


def gaussian_epsilon(delta: float, ratio: float) -> float:
    """Compute the least ε that `gaussian_delta` allows at δ, to ten digits, rounded up."""
    if ratio == 0 or gaussian_delta(0, ratio) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(high, ratio) > delta:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, ratio) > delta else (low, middle)
    return high


def gaussian_ratio(epsilon: float, delta: float) -> float:
    """Compute the largest μ = sensitivity/σ that is (ε, δ)-private.

    Raises:
        ValueError: ε not positive, or δ outside (0, 1).
    """
    check_budget(epsilon, delta)
    low, high = 0.0, 1.0
    while gaussian_delta(epsilon, high) < delta:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(epsilon, middle) <= delta else (low, middle)
    return low


def check_budget(epsilon: float, delta: float) -> None:
    """Raise ValueError where ε is not positive and finite, or δ is not in (0, 1); TypeError where it is no number."""
    positive("epsilon", epsilon)
    share("delta", delta, least=False)


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _log_normal_cdf(x: float) -> float:
    if x > -30:
        return math.log(_normal_cdf(x))
    return -x * x / 2 - math.log(-x) - math.log(2 * math.pi) / 2  # Mills' ratio, an upper bound


def clipped(batches: Iterable[Tensor], clip: float) -> Iterator[Tensor]:
    """Scale down rows longer than `clip`, which must be finite to be clipped at all.

    Args:
        batches: tensors (m, D).
        clip: C, the largest norm of a row.
    """
    for x in batches:
        norm = torch.linalg.vector_norm(x.double(), dim=1, keepdim=True)
        yield (x.double() * (clip / norm).clamp_max(1)).float()


def private_answer(
    query: BuyerQuery,
    batches: Iterable[Tensor],
    encoder: Encoder,
    seller: str,
    *,
    epsilon: float,
    delta: float,
    clip: float = 1.0,
    ledger: Ledger | None = None,
) -> SellerResponse:
    """Answer a query with (ε, δ)-differential privacy for any one row replaced by any other.

    The noise's random numbers come from the system, never from a seed that a buyer might know. Standard errors are made
    from the noisy moments, for normal rows, since measured ones would tell more about the data.

    Args:
        query: the buyer's.
        batches: tensors (m, D) of the seller's rows.
        encoder: how they were made; one that normalises needs `clip` = 1.
        seller: its name.
        epsilon, delta: for this answer.
        clip: C, chosen without looking at the data.
        ledger: is charged first, and refuses what exceeds its budget.

    Raises:
        ValueError: as `query.answer`, a budget or a clip that makes no sense, or a ledger that is used up.
    """
    check_budget(epsilon, delta)
    clip = positive("clip", clip)
    if encoder.normalize and clip != 1:
        raise ValueError(f"clip must be 1 where the encoder makes rows of unit norm, got {clip}")
    moments = collect(query, clipped(batches, clip), encoder)
    ratio = gaussian_ratio(epsilon, delta)
    if ledger is not None:
        ledger.charge(ratio)
    stretch = max(1.0, float(torch.linalg.matrix_norm(query.directions.double(), 2)))  # orthonormal but for rounding
    noisy = add_noise(moments, clip, ratio / stretch**2, known_energy=encoder.normalize)
    return SellerResponse(query.identifier, printable(seller, "seller"), noisy, epsilon, delta)


def noise_scales(rows: int, clip: float, ratio: float) -> tuple[float, float]:
    """Compute the standard deviations of the noise of means and of second moments, from sizes alone.

    Args:
        rows: n.
        clip: C.
        ratio: μ, sensitivity over standard deviation.
    """
    scale = SENSITIVITY / rows / ratio
    return scale * clip, scale * clip**2


def add_noise(
    moments: Moments, clip: float, ratio: float, *, known_energy: bool, generator: torch.Generator | None = None
) -> Moments:
    """Add the mechanism's noise to moments of clipped rows.

    Args:
        moments: of rows of norm ≤ clip.
        clip: C.
        ratio: μ.
        known_energy: whether every row has norm C exactly; then the energy needs no noise.
        generator: for tests; None draws from the system's randomness.
    """
    k, n = len(moments.mean), moments.rows
    mean_noise, second_noise = noise_scales(n, clip, ratio)
    mean = moments.mean + mean_noise * normal(k, generator=generator)
    upper = torch.triu(normal(k, k, generator=generator))
    upper.diagonal().mul_(math.sqrt(2))
    second = moments.second + second_noise / math.sqrt(2) * (torch.triu(upper) + torch.triu(upper, 1).T)
    energy = (
        clip**2
        if known_energy
        else max(moments.energy + second_noise * float(normal(1, generator=generator)), 1e-3 * clip**2)
    )
    variance = (second - torch.outer(mean, mean)).diagonal().clamp_min(0)
    return replace(
        moments,
        mean=mean,
        second=second,
        energy=energy,
        variance_se=variance * math.sqrt(2 / n),
        energy_se=0.0 if known_energy else second_noise,
        mean_noise=mean_noise,
        second_noise=second_noise,
    )


def _ratios(data: bytes) -> list[float]:
    """Read what a ledger holds."""
    spent = parse(data, "ledger").get("ratios")
    if not isinstance(spent, list) or not all(type(x) in (int, float) and 0 < x < 1e150 for x in spent):
        raise ValueError("the ledger must hold a list 'ratios' of positive numbers")
    return spent


class Ledger:
    """A seller's account of all it has answered, in a file, so that many queries can't average the noise away.

    Gaussian mechanisms compose exactly: answers of μ₁, μ₂, … are together one of √(Σμ²) (Dong, Roth, Su 2022,
    corollary 3.3).

    Args:
        path: a JSON file, made at the first charge.
        epsilon, delta: the budget of all answers together.

    Raises:
        ValueError: a budget that makes no sense, or a file that is no ledger.
    """

    def __init__(self, path: str | Path, *, epsilon: float, delta: float) -> None:
        check_budget(epsilon, delta)
        self.path, self.epsilon, self.delta = Path(path), epsilon, delta
        check_folder(self.path.parent, f"the folder of the ledger '{path}'")
        self._squares()

    def _squares(self) -> float:
        if not self.path.exists():
            return 0.0
        return float(sum(x * x for x in read_file(self.path, "ledger", 1 << 24, _ratios)))

    def spent(self) -> float:
        """Return the ε spent so far, at the budget's δ."""
        return gaussian_epsilon(self.delta, math.sqrt(self._squares()))

    def charge(self, ratio: float) -> None:
        """Enter an answer of μ = `ratio`, under a lock.

        Raises:
            ValueError: the budget would be exceeded; nothing is entered.
        """
        import fcntl

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(f".{self.path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            after = gaussian_epsilon(self.delta, math.sqrt(self._squares() + ratio**2))
            if after > self.epsilon * (1 + 1e-9):
                raise ValueError(
                    f"the budget of epsilon={self.epsilon} at delta={self.delta} would be exceeded: "
                    f"{self.spent():.4g} is spent, this answer would make it {after:.4g}"
                )
            entries = json.loads(self.path.read_text())["ratios"] if self.path.exists() else []
            write_whole(self.path, json.dumps({"ratios": [*entries, ratio]}).encode())

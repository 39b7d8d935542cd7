"""Does a seller tell the truth? What answers must obey, whoever gives them, and how to ask twice. (ours)

No test of moments can expose a seller that holds, or invents, one whole data set and answers from that; but such a
seller does not know the buyer's eigenvalues, nor which directions are decoys, so what it invents is not relevant. What
is exposed: answers that no data could give, answers that light up the span of the query and leave the rest dark,
answers that change from one query to the next, and answers that are the buyer's own data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from federated.arguments import share
from federated.market.messages import BuyerKey, SellerResponse
from federated.market.moments import Moments
from federated.market.privacy import gaussian_ratio, noise_scales

ALPHA = 1e-3  # false alarms of one test
NOISE = 0.03  # by which stated noise may miss its formula: a basis is orthonormal but for rounding
ROUNDING = 1e-5  # relative to the energy: fp32 directions and block sums, and another device's order of sums


@dataclass(frozen=True)
class Finding:
    """The outcome of one test."""

    test: str
    p_value: float  # how often an honest seller's answer is so extreme, at most
    suspicious: bool
    sentence: str


def audit(key: BuyerKey, response: SellerResponse, *, alpha: float = ALPHA) -> list[Finding]:
    """Test one answer.

    *possible*: the covariance has no negative eigenvalue, what lies along the directions is no more than all, and noise
    is stated as large as the stated budget takes, and no larger: a liar could hide behind it.
    *decoys*: a random direction outside the buyer's own holds, on average over such directions, the (D − κ − 1)-th part
    of what the seller has outside them. For J of them the ratio T of the two is at most χ²_J/J in the tail, with
    equality for a seller all of whose rest lies in one direction, so P(J·T ≥ x) ≤ P(χ²_J ≥ x) for every data set.
    *copy*: two independent samples differ by their sampling error at least: Σ((λ̂ᵢ − λᵢ)/se)² + Σ((m̂ᵢ − mᵢ)/se)² is
    χ²_{2(κ+1)} for one distribution and larger for two. A copy of the buyer's rows falls below that.

    Args:
        key: of the query that was answered.
        response: the seller's.
        alpha: the false alarms allowed to each test.

    Raises:
        ValueError: the response answers another query.
    """
    share("alpha", alpha, least=False)
    moments = key.turned(response)
    return [_possible(key, moments, alpha, _noise(response)), _decoys(key, moments, alpha), _copy(key, moments, alpha)]


def audit_pair(
    first: tuple[BuyerKey, SellerResponse], second: tuple[BuyerKey, SellerResponse], *, alpha: float = ALPHA
) -> Finding:
    """Test two answers of a seller to two queries of the same buyer, whose directions are the same but for decoys.

    What was turned back must agree, up to rounding and to the noise that both state: Σ Δ²/(σ₁² + σ₂²) over the numbers
    along the shared directions is χ².

    Args:
        first: a key and its response.
        second: the other.
        alpha: the false alarms allowed.

    Raises:
        ValueError: the two queries are not of one buyer's rows.
    """
    share("alpha", alpha, least=False)
    (key, response), (other_key, other_response) = first, second
    k = key.directions
    if other_key.directions != k or not torch.allclose(
        key.buyer().variance, other_key.buyer().variance, rtol=1e-3, atol=ROUNDING * key.moments.energy
    ):
        raise ValueError("both queries must come from the same rows of one buyer, with the same number of directions")
    a, b = key.seller(response), other_key.seller(other_response)
    i, j = torch.triu_indices(k, k)
    weight = torch.where(i == j, 1.0, math.sqrt(2)).double()
    second_difference = (a.second - b.second)[i, j] * weight
    mean_difference = a.mean - b.mean
    tolerance = ROUNDING * a.energy
    statistic = float(
        (second_difference.square() / (a.second_noise**2 + b.second_noise**2 + tolerance**2)).sum()
        + (mean_difference.square() / (a.mean_noise**2 + b.mean_noise**2 + tolerance * ROUNDING)).sum()
    )
    p = chi_square_tail(statistic, len(weight) + k)
    if a.rows != b.rows:
        return Finding("consistent", 0.0, True, f"it answered of {a.rows} rows first and of {b.rows} then")
    return _finding("consistent", p, alpha, "its two answers disagree", "its two answers agree")


def honest(sellers: Mapping[str, Moments], findings: Mapping[str, Iterable[Finding]]) -> dict[str, Moments]:
    """Return the sellers that no test finds suspicious."""
    return {name: m for name, m in sellers.items() if not any(f.suspicious for f in findings[name])}


def _noise(response: SellerResponse) -> float:
    """Return the noise of the means that the budget stated in an answer takes, as a share of the clip."""
    if response.epsilon is None or response.delta is None:
        return 0.0
    return noise_scales(response.moments.rows, 1.0, gaussian_ratio(response.epsilon, response.delta))[0]


def _possible(key: BuyerKey, moments: Moments, alpha: float, stated: float) -> Finding:
    k, sigmas, rounding = len(moments.mean), _sigmas(alpha), ROUNDING * moments.energy
    # with m the noisy mean and n its noise, Σ̂ = Σ + N − (mnᵀ + nmᵀ) + nnᵀ: no eigenvalue is below −‖N‖ − 2‖m‖‖n‖
    shift = 2 * float(moments.mean.norm()) * moments.mean_noise * (math.sqrt(k) + sigmas)
    slack = rounding + moments.second_noise * (math.sqrt(2 * k) + sigmas) + shift
    least = float(torch.linalg.eigvalsh(moments.covariance)[0])
    excess = float(moments.second.trace()) - moments.energy
    impossible = least < -slack or excess > rounding + moments.second_noise * sigmas * math.sqrt(k + 1)
    sentence = (
        f"no data have such moments (least variance {least:.3g}, {excess:.3g} more along the directions than at all)"
    )
    if key.normalize and moments.energy > 1 + ROUNDING:
        impossible, sentence = True, f"rows of unit norm can't have an energy of {moments.energy:.7g}"
    if moments.mean_noise > 0:
        clip = moments.second_noise / moments.mean_noise
        if moments.energy > clip**2 * (1 + ROUNDING) + moments.second_noise * sigmas:
            impossible, sentence = True, f"rows clipped to {clip:.3g} can't have an energy of {moments.energy:.3g}"
        elif key.normalize and abs(clip - 1) > ROUNDING:
            impossible, sentence = True, f"rows of unit norm are clipped to 1, and it states {clip:.3g}"
        elif abs(moments.mean_noise - stated * clip) > NOISE * stated * clip:
            impossible = True
            sentence = f"it states noise of {moments.mean_noise:.3g}, and its budget takes {stated * clip:.3g}"
    return _finding("possible", 0.0 if impossible else 1.0, alpha, sentence, "its moments are those of some data")


def _decoys(key: BuyerKey, moments: Moments, alpha: float) -> Finding:
    j, k = key.decoys, key.directions
    if j == 0:
        return Finding("decoys", 1.0, False, "the query had no decoys")
    energy = moments.second.diagonal()
    rest = max(moments.energy - float(energy[:k].sum()), ROUNDING * moments.energy)
    expected = rest / (key.dimension - k) + moments.second_noise * _sigmas(alpha) / math.sqrt(j)
    ratio = float(energy[k:].mean()) / expected
    return _finding(
        "decoys",
        chi_square_tail(j * ratio, j),
        alpha,
        f"along the decoys it reports {ratio:.1f} times what its rest leaves for them",
        f"along the decoys it reports {ratio:.2f} times what is expected",
    )


def _copy(key: BuyerKey, moments: Moments, alpha: float) -> Finding:
    k, buyer = key.directions, key.moments
    tiny = torch.finfo(torch.float64).tiny

    def squares(difference: Tensor, variance: Tensor) -> float:
        return float((difference.square() / variance.clamp_min(tiny)).sum())

    variance = buyer.variance_se.square() + moments.variance_se.square() + moments.second_noise**2
    mean = buyer.variance / buyer.rows + moments.variance / moments.rows + moments.mean_noise**2
    statistic = squares((buyer.variance - moments.variance)[:k], variance[:k])
    statistic += squares((buyer.mean - moments.mean)[:k], mean[:k])
    return _finding(
        "copy",
        1 - chi_square_tail(statistic, 2 * k),
        alpha,
        "its moments are nearer to the buyer's than another sample's could be",
        "its moments differ from the buyer's by a sampling error or more",
    )


def _finding(test: str, p: float, alpha: float, bad: str, good: str) -> Finding:
    return Finding(test, p, p < alpha, bad if p < alpha else good)


def chi_square_tail(x: float, degrees: int) -> float:
    """Compute P(χ² ≥ x)."""
    half = torch.tensor([degrees / 2, max(x, 0.0) / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _sigmas(alpha: float) -> float:
    """Return how many standard deviations a normal number exceeds with probability `alpha`."""
    return float(-torch.special.ndtri(torch.tensor(alpha, dtype=torch.float64)))

"""Does a seller tell the truth? What answers must obey, whoever gives them, and how to ask twice. (ours)

No test of moments can expose a seller that holds, or invents, one whole data set and answers from that; but such a
seller does not know the buyer's eigenvalues, nor which directions are decoys, so what it invents is not relevant. What
is exposed: answers that no data could give, answers that light up the span of the query and leave the rest dark,
answers that change from one query to the next, and answers that are the buyer's own data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from federated.market.query import BuyerKey, SellerResponse
from federated.market.score import Moments

ALPHA = 1e-3  # false alarms of one test
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

    *possible*: the covariance has no negative eigenvalue, and what lies along the directions is no more than all.
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
    moments = key.turned(response)
    return [_possible(moments, alpha), _decoys(key, moments, alpha), _copy(key, moments, alpha)]


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
    (key, response), (other_key, other_response) = first, second
    k = key.directions
    if other_key.directions != k or not torch.allclose(
        key.buyer().variance, other_key.buyer().variance, rtol=1e-3, atol=ROUNDING * key.moments.energy
    ):
        raise ValueError("both queries must come from the same rows of one buyer, with the same number of directions")
    a, b = key.seller(response), other_key.seller(other_response)
    # an eigenvector's sign may differ between the queries, and with it that of off-diagonal numbers
    flip = torch.where(key.buyer().mean * other_key.buyer().mean < 0, -1.0, 1.0).double()
    i, j = torch.triu_indices(k, k)
    weight = torch.where(i == j, 1.0, math.sqrt(2)).double()
    second_difference = (a.second - b.second * torch.outer(flip, flip))[i, j] * weight
    mean_difference = a.mean - b.mean * flip
    tolerance = ROUNDING * a.energy
    statistic = float(
        (second_difference.square() / (a.second_noise**2 + b.second_noise**2 + tolerance**2)).sum()
        + (mean_difference.square() / (a.mean_noise**2 + b.mean_noise**2 + tolerance * ROUNDING)).sum()
    )
    p = chi_square_tail(statistic, len(weight) + k)
    if a.rows != b.rows:
        return Finding("consistent", 0.0, True, f"it answered of {a.rows} rows first and of {b.rows} then")
    return _finding("consistent", p, alpha, "its two answers disagree", "its two answers agree")


def _possible(moments: Moments, alpha: float) -> Finding:
    noise = moments.second_noise * (2 * math.sqrt(len(moments.mean)) + _sigmas(alpha)) + 2 * moments.mean_noise
    slack = ROUNDING * moments.energy + noise
    least = float(torch.linalg.eigvalsh(moments.covariance)[0])
    excess = float(moments.second.trace()) - moments.energy
    impossible = least < -slack or excess > slack * math.sqrt(len(moments.mean))
    return _finding(
        "possible",
        0.0 if impossible else 1.0,
        alpha,
        f"no data have such moments (least variance {least:.3g}, {excess:.3g} more along the directions than at all)",
        "its moments are those of some data",
    )


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
    """P(χ² ≥ x)."""
    half = torch.tensor([degrees / 2, max(x, 0.0) / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def _sigmas(alpha: float) -> float:
    """How many standard deviations a normal number exceeds with probability `alpha`."""
    return float(-torch.special.ndtri(torch.tensor(alpha, dtype=torch.float64)))

"""Scores of a seller against a buyer by any measure, with a standard error from the sampling of both sides. (ours)"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from federated.market.measures import MEASURES, THRESHOLD, Side, compared, measure_of, shares, side
from federated.market.moments import Moments, StreamingMoments, moments_along, pool, relative_error
from sgc.checks import rate, whole

__all__ = ["MEASURES", "Moments", "Score", "StreamingMoments", "draw", "moments_along", "pool", "score"]


class Score(NamedTuple):
    """A measure's value and its standard error from both sides' sampling."""

    value: float
    standard_error: float


def draw(moments: Moments, draws: int, generator: torch.Generator) -> Side:
    """Draw moments as other samples of as many rows would give them: a parametric bootstrap.

    Covariances are Wishart with n/(1 + κ) degrees of freedom (drawn by Bartlett's decomposition) times a common
    log-normal factor of variance κ/n, which has the covariances of an elliptical distribution of kurtosis κ, as
    `variance_se` says it; means are normal with Σ/n. The energy moves with what lies along the directions as far as its
    own standard error allows. Noise that was added for privacy is added once more.

    Args:
        moments: of one side.
        draws: how many.
        generator: of random numbers.
    """
    k, n = len(moments.mean), moments.rows

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    covariance, energy = moments.covariance, side(moments).energy
    value, vector = torch.linalg.eigh(covariance)
    root = vector * value.clamp_min(0).sqrt()  # noise may have left a negative eigenvalue
    kurtosis = min(max((n * float(relative_error(moments)) ** 2 - 2) / 3, 0.0), float(n))
    degrees = max(n / (1 + kurtosis), k + 2.0)
    factor = torch.tril(normal(draws, k, k), -1)
    left = degrees - torch.arange(k, dtype=torch.float64)
    ninth = 2 / (9 * left)
    chi_square = left * (1 - ninth + ninth.sqrt() * normal(draws, k)).clamp_min(0).pow(3)  # Wilson and Hilferty 1931
    factor = root @ (factor + torch.diag_embed(chi_square.sqrt()))
    spread = math.sqrt(math.log1p(kurtosis / n))
    common = torch.exp(spread * normal(draws) - spread**2 / 2)
    sampled = factor @ factor.mT * (common / degrees)[:, None, None]
    shift = normal(draws, k) @ root.T / math.sqrt(n)
    moved = (sampled.diagonal(dim1=-2, dim2=-1) - (root * root).sum(1)).sum(-1)
    moved = moved + ((moments.mean + shift).square() - moments.mean.square()).sum(-1)
    own = float(moved.std()) if draws > 1 else 0.0
    with_it = min(1.0, moments.energy_se / own) if own > 0 else 0.0
    apart = math.sqrt(max(0.0, moments.energy_se**2 - (with_it * own) ** 2))
    upper = torch.triu(normal(draws, k, k))
    noise = moments.second_noise / math.sqrt(2) * (upper + upper.mT)
    noise.diagonal(dim1=-2, dim2=-1).div_(math.sqrt(2))
    return Side(
        sampled + (covariance - root @ root.T) + noise,
        moments.mean + shift + moments.mean_noise * normal(draws, k),
        (energy + with_it * moved + apart * normal(draws)).clamp_min(0.01 * float(energy)),
    )


def score(
    buyer: Moments,
    seller: Moments,
    by: str = "relevance",
    *,
    threshold: float = THRESHOLD,
    draws: int = 400,
    seed: int = 0,
) -> Score:
    """Score one seller: the measure and its standard error.

    The error is how far scores of other samples scatter. It leaves out that sampling lowers every seller's score alike,
    so it serves to compare sellers, not to judge how far a score is from 1.

    Args:
        buyer: its moments along the directions.
        seller: the seller's along the same.
        by: the name of a measure in `MEASURES`.
        threshold: relative to the buyer's largest variance.
        draws: of the parametric bootstrap; 0 leaves the standard error NaN.
        seed: of the draws.

    Raises:
        ValueError: an unknown measure, or the two sides have different numbers of directions.
    """
    if len(buyer.mean) != len(seller.mean):
        raise ValueError(f"both sides must have the same directions, got {len(buyer.mean)} and {len(seller.mean)}")
    measure, threshold = measure_of(by), rate("threshold", threshold)
    draws, seed = whole("draws", draws, at_least=0), whole("seed", seed, at_least=0)
    kept, weight = compared(shares(buyer), threshold)
    value = float(measure(side(buyer), side(seller), kept, weight))
    if not draws:
        return Score(value, math.nan)
    generator = torch.Generator().manual_seed(seed)
    sample = measure(draw(buyer, draws, generator), draw(seller, draws, generator), kept, weight)
    return Score(value, float(sample.std()))

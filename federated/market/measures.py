"""The measures of a seller against a buyer, and the table that `rank`, `score` and the command line read. (ours)

A measure compares covariance, mean and energy along the buyer's directions; see docs/market.md. Most read `Shares`, the
moments divided by each side's own energy E‖x‖². So nothing changes when either side rescales its embeddings, and what
lies outside the directions is known as well. `federated.market.reference` has the measures as published.

To add a measure, write it as a function here or in a file of its own, and enter it in `MEASURES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from federated.market.moments import Moments

THRESHOLD = 0.01  # of λ₁: a direction with less is not compared
FLOOR = 0.05  # a ratio counts as at least this, and at most one minus this


class Side(NamedTuple):
    """What is compared of one side; leading dimensions, if any, are draws."""

    covariance: Tensor  # (…, K, K)
    mean: Tensor  # (…, K)
    energy: Tensor  # (…,)


class Shares(NamedTuple):
    """Moments as shares of the energy; leading dimensions, if any, are draws."""

    variance: Tensor  # (…, K) p = λ/E‖x‖²
    mean: Tensor  # (…, K) a = m/√E‖x‖²
    rest: Tensor  # (…,) 1 − Σ(p + a²), the share outside the directions


def side(moments: Moments) -> Side:
    """Return what is compared of one side.

    Raises:
        ValueError: every row is zero.
    """
    if not moments.energy > 0:
        raise ValueError(f"rows must not all be zero, got a mean squared norm of {moments.energy}")
    return Side(moments.covariance, moments.mean, torch.tensor(moments.energy, dtype=torch.float64))


def shares(moments: Moments | Side) -> Shares:
    """Divide moments by their energy, so that scale is gone; raises as `side`."""
    covariance, mean, energy = side(moments) if isinstance(moments, Moments) else moments
    p = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0) / energy[..., None]
    a = mean / energy.sqrt()[..., None]
    return Shares(p, a, (1 - (p + a.square()).sum(-1)).clamp(0, 1))


def kept_directions(buyer: Shares, threshold: float = THRESHOLD) -> Tensor:
    """Choose the directions that are compared: those with a variance of at least `threshold`·λ₁, or a mean that large.

    Args:
        buyer: without draws.
        threshold: relative to the buyer's largest variance.

    Returns:
        (K,) bool.
    """
    size = buyer.variance + buyer.mean.square()
    return size >= threshold * buyer.variance.max()


def weights(buyer: Shares, kept: Tensor) -> Tensor:
    """Weigh what `overlaps` compares: a direction by the buyer's variance along it, the rest like an average direction.

    Args:
        buyer: without draws.
        kept: (K,) bool.

    Returns:
        (κ' + 1,), adding up to one.
    """
    p = buyer.variance[kept]
    p = p / p.sum().clamp_min(torch.finfo(p.dtype).tiny)
    return torch.cat([p, p.new_full((1,), 1 / len(p))]) / (p.sum() + 1 / len(p))


def compared(buyer: Shares, threshold: float = THRESHOLD) -> tuple[Tensor, Tensor]:
    """Return which directions are compared and what each counts: `kept_directions` and their `weights`."""
    kept = kept_directions(buyer, threshold)
    return kept, weights(buyer, kept)


def overlaps(buyer: Shares, seller: Shares, kept: Tensor) -> Tensor:
    """Compare direction by direction: rᵢ = min(p, p̂)/max(p, p̂) · exp(−(a − â)²/(4(p + p̂))), and the rest by its ratio.

    The exponential is the Bhattacharyya coefficient's price of a shift between two normal densities.

    Args:
        buyer: with or without draws.
        seller: the same.
        kept: (K,) bool, the directions to compare.

    Returns:
        (…, κ' + 1) in [0, 1].
    """
    p, q = buyer.variance[..., kept], seller.variance[..., kept]
    shift = (buyer.mean - seller.mean)[..., kept].square() / (4 * (p + q)).clamp_min(torch.finfo(p.dtype).tiny)
    along = _ratio(p, q) * torch.exp(-shift)
    rest = _ratio(buyer.rest, seller.rest)
    shape = torch.broadcast_shapes(along.shape[:-1], rest.shape)
    return torch.cat([along.expand(*shape, -1), rest.expand(shape)[..., None]], -1)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """Compute min/max, and 1 where both are zero: equal is equal."""
    high = torch.maximum(x, y)
    return torch.where(high > 0, torch.minimum(x, y) / high.clamp_min(torch.finfo(x.dtype).tiny), torch.ones_like(high))


def relevance(overlap: Tensor, weight: Tensor | None = None, floor: float = FLOOR) -> Tensor:
    """Compute Π r̃ᵢ^{wᵢ} with r̃ = ε + (1 − 2ε)·r, which lies in [ε, 1 − ε].

    So one dead direction costs a factor of about ε^{wᵢ} and not everything, and relevance + diversity ≤ 1 holds by the
    inequality of the means, as it does for the published forms.

    Args:
        overlap: r (…, κ'), of `overlaps`.
        weight: w (κ',), of `weights`; None weighs all alike.
        floor: ε.
    """
    return _weighted_mean((floor + (1 - 2 * floor) * overlap).log(), weight).exp()


def diversity(overlap: Tensor, weight: Tensor | None = None, floor: float = FLOOR) -> Tensor:
    """Compute Π (1 − r̃ᵢ)^{wᵢ}: one exact match costs a factor of about ε^{wᵢ}. Arguments as in `relevance`."""
    return _weighted_mean((floor + (1 - 2 * floor) * (1 - overlap)).log(), weight).exp()


def _weighted_mean(x: Tensor, weight: Tensor | None) -> Tensor:
    return x.mean(-1) if weight is None else (x * weight).sum(-1)


def l2(buyer: Shares, seller: Shares, kept: Tensor) -> Tensor:
    """Compute −‖(√p, √rest) − (√p̂, √rest̂)‖₂: the spectra's Hellinger distance up to sign and √2; more is nearer."""
    return -(_spectrum(buyer, kept) - _spectrum(seller, kept)).norm(dim=-1)


def cosine(buyer: Shares, seller: Shares, kept: Tensor) -> Tensor:
    """Compute the cosine of (√p, √rest) and (√p̂, √rest̂): the spectra's Bhattacharyya coefficient; no sign enters."""
    return torch.nn.functional.cosine_similarity(_spectrum(buyer, kept), _spectrum(seller, kept), dim=-1)


def correlation(buyer: Shares, seller: Shares, kept: Tensor) -> Tensor:
    """Compute the Pearson correlation of the spectra of `cosine`."""
    b, s = _spectrum(buyer, kept), _spectrum(seller, kept)
    return torch.nn.functional.cosine_similarity(b - b.mean(-1, keepdim=True), s - s.mean(-1, keepdim=True), dim=-1)


def _spectrum(side: Shares, kept: Tensor) -> Tensor:
    """Return (√(p + a²), √rest) (…, κ' + 1), a vector whose squares add up to one where every direction is kept."""
    size = side.variance + side.mean.square()
    return torch.cat([size[..., kept], side.rest[..., None]], -1).clamp_min(0).sqrt()


def volume(buyer: Side, seller: Side, kept: Tensor, floor: float = FLOOR) -> Tensor:
    """Compute (1/κ')·Σ ln clip(gᵢ, ε, 1), gᵢ the eigenvalues of `relative_covariance`: at most 0.

    Per row, so that size does not enter, and in shares of energy, so that noise, which spreads its energy over all of
    the space, covers little of the buyer's.

    Args:
        buyer: along the directions, with or without draws.
        seller: along the same.
        kept: (K,) bool.
        floor: ε.
    """
    return torch.linalg.eigvalsh(relative_covariance(buyer, seller, kept)).clamp(floor, 1).log().mean(-1)


def relative_covariance(buyer: Side, seller: Side, kept: Tensor) -> Tensor:
    """Compute Σ_b^{−1/2} Σ_s Σ_b^{−1/2} (…, κ', κ') in shares of energy."""
    b, s = (x.covariance[..., kept, :][..., kept] / x.energy[..., None, None] for x in (buyer, seller))
    whiten = inverse_root(b)
    relative = whiten @ s @ whiten
    return (relative + relative.mT) / 2


def inverse_root(covariance: Tensor) -> Tensor:
    """Compute Σ^{−1/2} (…, K, K), eigenvalues held above 10⁻⁶ of the largest."""
    value, vector = torch.linalg.eigh(covariance)
    largest = value[..., -1:].clamp_min(torch.finfo(value.dtype).tiny)
    value = torch.maximum(value, 1e-6 * largest)
    return (vector / value.sqrt()[..., None, :]) @ vector.mT


def vendi(seller: Side) -> Tensor:
    """Compute the Vendi score of the projected rows: exp of the entropy of the spectrum of E[yyᵀ]/tr."""
    second = seller.covariance + seller.mean[..., :, None] * seller.mean[..., None, :]
    value = torch.linalg.eigvalsh(second).clamp_min(0)
    total = value.sum(-1, keepdim=True).clamp_min(torch.finfo(value.dtype).tiny)
    return torch.special.entr(value / total).sum(-1).exp()


def dispersion(buyer: Shares, seller: Shares, kept: Tensor, floor: float = FLOOR) -> Tensor:
    """Compute the geometric mean of the standard deviations relative to the buyer's, √clip(p̂/p, ε, 1)."""
    p = buyer.variance[..., kept].clamp_min(torch.finfo(torch.float64).tiny)
    return (seller.variance[..., kept] / p).clamp(floor, 1).log().mean(-1).div(2).exp()


Measure = Callable[[Side, Side, Tensor, Tensor], Tensor]  # of buyer, seller, kept, weight; more is better
MEASURES: dict[str, Measure] = {
    "relevance": lambda b, s, kept, weight: relevance(overlaps(shares(b), shares(s), kept), weight),
    "diversity": lambda b, s, kept, weight: diversity(overlaps(shares(b), shares(s), kept), weight),
    "volume": lambda b, s, kept, weight: volume(b, s, kept),
    "dispersion": lambda b, s, kept, weight: dispersion(shares(b), shares(s), kept),
    "l2": lambda b, s, kept, weight: l2(shares(b), shares(s), kept),
    "cosine": lambda b, s, kept, weight: cosine(shares(b), shares(s), kept),
    "correlation": lambda b, s, kept, weight: correlation(shares(b), shares(s), kept),
    "vendi": lambda b, s, kept, weight: vendi(s),
}


def measure_of(name: str) -> Measure:
    """Return a measure by its name; raises ValueError for another."""
    if name not in MEASURES:
        raise ValueError(f"a measure must be one of {', '.join(MEASURES)}, got {name!r}")
    return MEASURES[name]

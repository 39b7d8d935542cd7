"""The measures of [MARKET] as its reference implementation forms them, weak points kept, to compare with.

[MARKET] is Lu, Amiri, Raskar, arXiv 2406.04257. Σ_b and Σ_s are the covariances of the buyer's and a seller's
embeddings (n − 1 in the denominator), V (D, κ) the leading eigenvectors of Σ_b and λ (κ,) their eigenvalues.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

THRESHOLD = 0.1  # absolute: with unit-norm embeddings no eigenvalue reaches it, and every score is 1


def norm_values(cross: Tensor) -> Tensor:
    """Compute λ̂ᵢ = ‖Σ_s vᵢ‖₂, which is at least the variance along vᵢ.

    Args:
        cross: Σ_s V (D, κ).
    """
    return torch.linalg.vector_norm(cross, dim=0)


def relevance(buyer: Tensor, seller: Tensor, threshold: float = THRESHOLD) -> float:
    """Compute (Π min(λᵢ, λ̂ᵢ)/max(λᵢ, λ̂ᵢ))^{1/κ'} over the κ' directions with λᵢ ≥ threshold, 1 for none.

    Args:
        buyer: λ (κ,), not negative.
        seller: λ̂ (κ,), not negative.
        threshold: absolute.
    """
    return _geometric_mean(_ratios(buyer, seller, threshold))


def diversity(buyer: Tensor, seller: Tensor, threshold: float = THRESHOLD) -> float:
    """Compute (Π |λᵢ − λ̂ᵢ|/max(λᵢ, λ̂ᵢ))^{1/κ'}: arguments as in `relevance`."""
    return _geometric_mean(1 - _ratios(buyer, seller, threshold))


def _ratios(buyer: Tensor, seller: Tensor, threshold: float) -> Tensor:
    kept = buyer >= threshold
    low, high = torch.minimum(buyer, seller)[kept].double(), torch.maximum(buyer, seller)[kept].double()
    return low / high.clamp_min(torch.finfo(torch.float64).tiny)


def _geometric_mean(x: Tensor) -> float:
    return float(x.prod() ** (1 / len(x))) if len(x) else 1.0


def l2(buyer: Tensor, seller: Tensor) -> float:
    """Compute −‖b − s‖₂ between the column means b = mean(Σ_b V) and s = mean(Σ_s V), each (κ,); more is nearer."""
    return -float((buyer - seller).norm())


def cosine(buyer: Tensor, seller: Tensor) -> float:
    """Compute the cosine between the column means, as in `l2`."""
    return float(torch.nn.functional.cosine_similarity(buyer.double(), seller.double(), dim=0))


def correlation(buyer: Tensor, seller: Tensor) -> float:
    """Compute Pearson's correlation between the column means, as in `l2`; an eigenvector's sign changes it."""
    return cosine(buyer - buyer.mean(), seller - seller.mean())


def volume(second: Tensor, rows: int) -> float:
    """Compute log det (XV)ᵀ(XV), which grows by κ·ln 2 when every row is given twice.

    Args:
        second: mean of Vᵀxxᵀ V over the rows (κ, κ).
        rows: n.
    """
    return float(torch.logdet(second.double())) + len(second) * math.log(rows)


def vendi(x: Tensor) -> float:
    """Compute exp of the entropy of the eigenvalues of XᵀX/n, rows scaled to unit norm (Friedman and Dieng, 2023).

    Args:
        x: (n, D).
    """
    x = torch.nn.functional.normalize(x.double(), dim=1)
    p = torch.linalg.svdvals(x).square() / len(x)
    return float(torch.special.entr(p).sum().exp())


def dispersion(seller: Tensor) -> float:
    """Compute the geometric mean of the projected standard deviations, √λ̂ᵢ.

    Args:
        seller: λ̂ (κ,), variances.
    """
    return _geometric_mean(seller.double().sqrt())


def data_dependent_noise(x: Tensor, epsilon: float, delta: float) -> float:
    """Compute noise for a mean from a sensitivity *read off the data*: its size reveals the largest row.

    Args:
        x: (n, κ) what is averaged.
        epsilon, delta: of the formula; the noise does not keep them.
    """
    sensitivity = 2 * float(x.norm(dim=1).max()) / len(x)
    return sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon

"""Rows of buyers and sellers, and their moments along the buyer's directions."""

import torch

from federated.market.moments import Moments, moments_along


def rows(n: int, seed: int, spread: torch.Tensor | None = None) -> torch.Tensor:
    """Normal rows of falling spread in 24 dimensions around a common mean."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0, 3, 24).neg().exp() if spread is None else spread
    return torch.randn(n, 24, generator=generator) * spread + 0.5


def directions_of(x: torch.Tensor, count: int) -> torch.Tensor:
    return torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:count].T.contiguous()


def both(buyer: torch.Tensor, seller: torch.Tensor, count: int = 6) -> tuple[Moments, Moments]:
    v = directions_of(buyer, count)
    return moments_along(buyer, v), moments_along(seller, v)

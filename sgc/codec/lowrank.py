"""The first projection of double compression: a basis of the gradient's leading left singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor

POWER_ITERATIONS = 2
OVERSAMPLING = 8


def leading_basis(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """Span the leading left singular vectors of a matrix by a randomized range finder.

    Halko, Martinsson & Tropp 2011, Algorithm 4.4: a Gaussian probe, two power iterations with QR between them, and an
    SVD of the small projected matrix only.

    Args:
        matrix: (m, m') fp32 with m ≤ m'.
        rank: r, at most m.
        seed: of the probe.

    Returns:
        P (m, r) fp32 with orthonormal columns, in the order of the singular values.
    """
    rows, cols = matrix.shape
    width = min(rows, rank + OVERSAMPLING)
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(cols, width, generator=generator, dtype=torch.float32).to(matrix.device)
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    small = basis.T @ matrix
    order = torch.linalg.eigh(small @ small.T).eigenvectors.flip(1)
    return (basis @ order[:, :rank]).contiguous()


def turn(rows: Tensor, old_basis: Tensor, new_basis: Tensor, *, squared: bool = False) -> Tensor:
    """Express what is held for each row of PᵀG in a new basis: rows ← (P_newᵀ P_old)·rows.

    Exact for whatever is linear in PᵀG. For squares, whose cross terms were never held, the squared rotation is used:
    what independent rows would give.

    Args:
        rows: (r·pieces, …), the rank axis first.
        old_basis: P_old (m, r).
        new_basis: P_new (m, r).
        squared: whether `rows` holds squares.
    """
    rotation = new_basis.T @ old_basis
    if squared:
        rotation = rotation.square()
    return (rotation @ rows.reshape(old_basis.shape[1], -1)).view_as(rows)

"""Moments of one side's rows along the buyer's directions: computed block by block, pooled, turned. (ours)"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK_ENTRIES = 1 << 21  # entries of the data worked on at a time, in cache
MAX_NORM = 1e18  # of a row; its square must be a float32


@dataclass(frozen=True)
class Moments:
    """What is known of one side's rows along K orthonormal directions. All float64.

    Moments are means over rows, so those of a union of sellers are the means of theirs, weighted by rows: `pool`.
    """

    rows: int
    mean: Tensor  # (K,) of the projections
    second: Tensor  # (K, K) mean of their outer products
    energy: float  # mean of ‖x‖²
    variance_se: Tensor  # (K,) standard error of each variance
    energy_se: float = 0.0
    mean_noise: float = 0.0  # standard deviation of noise added for privacy, entry by entry
    second_noise: float = 0.0

    @property
    def covariance(self) -> Tensor:
        """The covariance of the projections (K, K)."""
        return self.second - torch.outer(self.mean, self.mean)

    @property
    def variance(self) -> Tensor:
        """The variance along each direction (K,), not negative even where noise was added."""
        return self.covariance.diagonal().clamp_min(0)

    def turned(self, rotation: Tensor) -> Moments:
        """Compute the moments along `directions @ rotation`.

        The standard errors of the variances are carried over as for an elliptical distribution of one kurtosis, which
        has Var(λ̂) = (2 + 3κ)·λ²/n along every direction; κ is the mean over the directions at hand.

        Args:
            rotation: (K, L) with orthonormal columns.
        """
        rotation = rotation.double()
        second, mean = rotation.T @ self.second @ rotation, rotation.T @ self.mean
        variance = (second - torch.outer(mean, mean)).diagonal().clamp_min(0)
        return replace(self, mean=mean, second=second, variance_se=variance * relative_error(self))

    def first(self, count: int) -> Moments:
        """Return the moments along the first `count` directions."""
        mean, second, variance_se = self.mean[:count], self.second[:count, :count], self.variance_se[:count]
        return replace(self, mean=mean, second=second, variance_se=variance_se)


def pool(parts: Iterable[Moments]) -> Moments:
    """Return the moments of the rows of several sellers together, weighted by rows.

    Raises:
        ValueError: no parts.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("at least one seller is needed to pool, got 0")
    rows = sum(part.rows for part in parts)
    w = [part.rows / rows for part in parts]
    whole = sum((x * part.mean for x, part in zip(w, parts, strict=True)), torch.zeros_like(parts[0].mean))

    def mean(values: list[Tensor]) -> Tensor:
        return sum((x * y for x, y in zip(w, values, strict=True)), torch.zeros_like(values[0]))

    def rms(values: list[float]) -> float:
        return math.sqrt(sum((x * y) ** 2 for x, y in zip(w, values, strict=True)))

    return Moments(
        rows,
        whole,
        mean([part.second for part in parts]),
        sum(x * part.energy for x, part in zip(w, parts, strict=True)),
        mean([x * _variance_of_variance(part, whole) for x, part in zip(w, parts, strict=True)]).sqrt(),
        rms([part.energy_se for part in parts]),
        rms([part.mean_noise for part in parts]),
        rms([part.second_noise for part in parts]),
    )


def _variance_of_variance(part: Moments, mean: Tensor) -> Tensor:
    """Compute the sampling variance (K,) of a part's share in a variance around `mean`: its own, and of its shift."""
    return part.variance_se.square() + 4 * (part.mean - mean).square() * part.variance / part.rows


class StreamingMoments:
    """Moments along directions, block by block: D×K numbers are held, however many rows come.

    Sums are fp32 inside a block of rows and float64 over blocks; powers are taken around the first block's mean, in
    units of its root mean square rounded to a power of two, so that fourth powers neither overflow nor vanish.

    Args:
        directions: (D, K), orthonormal columns.
        cross: also keep Σ_s V (D, K), which only the reference measures need and which costs a second product.

    Example:
        >>> x = torch.randn(100, 8)
        >>> moments = StreamingMoments(torch.eye(8)[:, :2]).update(x[:50]).update(x[50:]).moments()
        >>> torch.allclose(moments.mean.float(), x.mean(0)[:2], atol=1e-6)
        True
    """

    def __init__(self, directions: Tensor, *, cross: bool = False) -> None:
        self.rows, k, device = 0, directions.shape[1], directions.device
        self._pivot: Tensor | None = None
        self._scaled, self._unit = directions.float(), 1.0
        self._power = torch.zeros(4, k, dtype=torch.float64, device=device)  # sums of y, y², y³, y⁴
        self._outer = torch.zeros(k, k, dtype=torch.float64, device=device)
        self._energy = torch.zeros(2, dtype=torch.float64, device=device)  # sums of ‖x‖², ‖x‖⁴
        self._cross = torch.zeros(directions.shape, dtype=torch.float64, device=device) if cross else None
        self._total = torch.zeros(len(directions), dtype=torch.float64, device=device) if cross else None

    def update(self, x: Tensor) -> StreamingMoments:
        """Add rows.

        Args:
            x: (m, D), finite.

        Returns:
            Itself.

        Raises:
            ValueError: rows of another dimension, or a row that is not finite or too long, named by its number.
        """
        dimension = len(self._scaled)
        if x.ndim != 2 or x.shape[1] != dimension:
            raise ValueError(
                f"rows must have the query's dimension {dimension}, got a tensor of shape {tuple(x.shape)}"
            )
        if len(x):
            for block in x.split(max(1, BLOCK_ENTRIES // max(1, dimension))):
                self._add(block.float())
        return self

    def _add(self, x: Tensor) -> None:
        norm = torch.linalg.vector_norm(x, dim=1)
        if not bool(norm.max() <= MAX_NORM):  # NaN too
            bad = ~(norm <= MAX_NORM)
            row = self.rows + int(bad.nonzero()[0])
            if not torch.isfinite(x).all():
                raise ValueError(f"every row must be finite, got NaN or infinity in row {row}")
            raise ValueError(f"every row must have a norm of at most {MAX_NORM:g}, got a longer one in row {row}")
        norm = norm.double().square_()
        if self._pivot is None:
            self._unit = 2.0 ** round(math.log2(max(math.sqrt(float(norm.mean())), 1e-18)))
            self._scaled = self._scaled / self._unit
            self._pivot = (x @ self._scaled).mean(0)
        y = x @ self._scaled
        y -= self._pivot
        square = y * y
        outer = y.T @ y
        self._power[0] += y.sum(0)
        self._power[1] += outer.diagonal()
        self._power[2] += torch.linalg.vecdot(square, y, dim=0)
        self._power[3] += torch.linalg.vecdot(square, square, dim=0)
        self._outer += outer
        self._energy[0] += norm.sum()
        self._energy[1] += norm.square_().sum()
        if self._cross is not None and self._total is not None:
            self._cross += x.T @ y
            self._total += x.sum(0)
        self.rows += len(x)

    def moments(self) -> Moments:
        """Return the moments of all the rows so far.

        Raises:
            ValueError: fewer than two rows.
        """
        if self.rows < 2 or self._pivot is None:
            raise ValueError(f"at least 2 rows are needed, got {self.rows}")
        n = self.rows
        first, square, cube, fourth = self._power / n
        variance = square - first.square()
        central = fourth - 4 * first * cube + 6 * first.square() * square - 3 * first.pow(4)
        pivot = self._pivot.double()
        mean = pivot + first
        second = (self._outer / n + torch.outer(pivot, first) + torch.outer(mean, pivot)) * self._unit**2
        energy, energy_square = (self._energy / n).tolist()
        error = (central - variance.square()).clamp_min(0).div(n).sqrt() * self._unit**2
        if not torch.isfinite(error).all():
            raise ValueError("rows must be of comparable length, got some 10^9 times as long as the first ones")
        return Moments(
            n,
            mean * self._unit,
            (second + second.T) / 2,
            energy,
            error,
            math.sqrt(max(0.0, energy_square - energy**2) / n),
        )

    def cross(self) -> Tensor:
        """Return Σ_s V (D, K) with n − 1 in the denominator, for the reference measures.

        Raises:
            RuntimeError: made without `cross=True`, or fewer than two rows.
        """
        if self._cross is None or self._total is None or self.rows < 2:
            raise RuntimeError("cross() needs StreamingMoments(..., cross=True) and at least 2 rows")
        n = self.rows
        return (self._cross - torch.outer(self._total, self._power[0] / n)) * self._unit / (n - 1)


def moments_along(x: Tensor, directions: Tensor) -> Moments:
    """Compute the moments of rows (n, D) along orthonormal directions (D, K)."""
    return StreamingMoments(directions).update(x).moments()


def relative_error(moments: Moments) -> Tensor:
    """Return the root mean square of the variances' relative standard errors, 1 where nothing varies."""
    relative = moments.variance_se / moments.variance.clamp_min(torch.finfo(torch.float64).tiny)
    relative = relative[torch.isfinite(relative) & (moments.variance > 0)]
    return relative.square().mean().sqrt().nan_to_num(nan=1.0, posinf=1.0)

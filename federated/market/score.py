"""Scores of a seller against a buyer, from the moments of both along the buyer's directions. (ours; see docs/market.md)

Every measure reads `Shares`: the moments divided by each side's own energy E‖x‖². So nothing changes when either side
rescales its embeddings, and what lies outside the directions is known as well. `federated.market.reference` has the
measures as published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sgc.checks import rate, whole

THRESHOLD = 0.01  # of λ₁: a direction with less is not compared
FLOOR = 0.05  # a ratio counts as at least this, and at most one minus this
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
        """Give the moments along `directions @ rotation`.

        The standard errors of the variances are carried over as for an elliptical distribution of one kurtosis, which
        has Var(λ̂) = (2 + 3κ)·λ²/n along every direction; κ is the mean over the directions at hand.

        Args:
            rotation: (K, L) with orthonormal columns.
        """
        rotation = rotation.double()
        second, mean = rotation.T @ self.second @ rotation, rotation.T @ self.mean
        variance = (second - torch.outer(mean, mean)).diagonal().clamp_min(0)
        return replace(self, mean=mean, second=second, variance_se=variance * _relative_error(self))


def pool(parts: Iterable[Moments]) -> Moments:
    """Give the moments of the rows of several sellers together, weighted by rows.

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
    """Give the sampling variance (K,) of what a part adds to a variance around `mean`: of its own, and of its shift."""
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
        """Give the moments of all the rows so far.

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
        """Give Σ_s V (D, K) with n − 1 in the denominator, for the reference measures.

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
    """Give what is compared of one side.

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
    """min/max, and 1 where both are zero: equal is equal."""
    high = torch.maximum(x, y)
    return torch.where(high > 0, torch.minimum(x, y) / high.clamp_min(torch.finfo(x.dtype).tiny), torch.ones_like(high))


def kept_directions(buyer: Shares, threshold: float = THRESHOLD) -> Tensor:
    """Choose the directions that are compared: a variance of at least `threshold`·λ₁, or a mean that large.

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


def relevance(overlap: Tensor, weight: Tensor | None = None, floor: float = FLOOR) -> Tensor:
    """Π r̃ᵢ^{wᵢ} with r̃ = ε + (1 − 2ε)·r, which lies in [ε, 1 − ε].

    So one dead direction costs a factor of about ε^{wᵢ} and not everything, and relevance + diversity ≤ 1 holds by the
    inequality of the means, as it does for the published forms.

    Args:
        overlap: r (…, κ'), of `overlaps`.
        weight: w (κ',), of `weights`; None weighs all alike.
        floor: ε.
    """
    return _weighted_mean((floor + (1 - 2 * floor) * overlap).log(), weight).exp()


def diversity(overlap: Tensor, weight: Tensor | None = None, floor: float = FLOOR) -> Tensor:
    """Π (1 − r̃ᵢ)^{wᵢ}: one exact match costs a factor of about ε^{wᵢ}. Arguments as in `relevance`."""
    return _weighted_mean((floor + (1 - 2 * floor) * (1 - overlap)).log(), weight).exp()


def _weighted_mean(x: Tensor, weight: Tensor | None) -> Tensor:
    return x.mean(-1) if weight is None else (x * weight).sum(-1)


def l2(buyer: Shares, seller: Shares, kept: Tensor) -> Tensor:
    """−‖(√p, √rest) − (√p̂, √rest̂)‖₂, the Hellinger distance of the two spectra up to sign and √2; more is nearer."""
    return -(_spectrum(buyer, kept) - _spectrum(seller, kept)).norm(dim=-1)


def cosine(buyer: Shares, seller: Shares, kept: Tensor) -> Tensor:
    """Cosine of (√p, √rest) and (√p̂, √rest̂), the Bhattacharyya coefficient of the spectra; no sign enters."""
    return torch.nn.functional.cosine_similarity(_spectrum(buyer, kept), _spectrum(seller, kept), dim=-1)


def correlation(buyer: Shares, seller: Shares, kept: Tensor) -> Tensor:
    """Pearson correlation of the spectra of `cosine`."""
    b, s = _spectrum(buyer, kept), _spectrum(seller, kept)
    return torch.nn.functional.cosine_similarity(b - b.mean(-1, keepdim=True), s - s.mean(-1, keepdim=True), dim=-1)


def _spectrum(side: Shares, kept: Tensor) -> Tensor:
    """Give (√(p + a²), √rest) (…, κ' + 1), a vector whose squares add up to one where every direction is kept."""
    size = side.variance + side.mean.square()
    return torch.cat([size[..., kept], side.rest[..., None]], -1).clamp_min(0).sqrt()


def volume(buyer: Side, seller: Side, kept: Tensor, floor: float = FLOOR) -> Tensor:
    """(1/κ')·Σ ln clip(gᵢ, ε, 1), gᵢ the eigenvalues of the seller's covariance relative to the buyer's: at most 0.

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
    """Σ_b^{−1/2} Σ_s Σ_b^{−1/2} (…, κ', κ') in shares of energy."""
    b, s = (x.covariance[..., kept, :][..., kept] / x.energy[..., None, None] for x in (buyer, seller))
    whiten = inverse_root(b)
    relative = whiten @ s @ whiten
    return (relative + relative.mT) / 2


def inverse_root(covariance: Tensor) -> Tensor:
    """Σ^{−1/2} (…, K, K), eigenvalues held above 10⁻⁶ of the largest."""
    value, vector = torch.linalg.eigh(covariance)
    largest = value[..., -1:].clamp_min(torch.finfo(value.dtype).tiny)
    value = torch.maximum(value, 1e-6 * largest)
    return (vector / value.sqrt()[..., None, :]) @ vector.mT


def vendi(seller: Side) -> Tensor:
    """Vendi score of the projected rows, from their moments: exp of the entropy of the spectrum of E[yyᵀ]/tr."""
    second = seller.covariance + seller.mean[..., :, None] * seller.mean[..., None, :]
    value = torch.linalg.eigvalsh(second).clamp_min(0)
    total = value.sum(-1, keepdim=True).clamp_min(torch.finfo(value.dtype).tiny)
    return torch.special.entr(value / total).sum(-1).exp()


def dispersion(buyer: Shares, seller: Shares, kept: Tensor, floor: float = FLOOR) -> Tensor:
    """Geometric mean of the standard deviations relative to the buyer's, √clip(p̂/p, ε, 1)."""
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
    kurtosis = min(max((n * float(_relative_error(moments)) ** 2 - 2) / 3, 0.0), float(n))
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


def _relative_error(moments: Moments) -> Tensor:
    """Give the root mean square of the variances' relative standard errors, 1 where nothing varies."""
    relative = moments.variance_se / moments.variance.clamp_min(torch.finfo(torch.float64).tiny)
    relative = relative[torch.isfinite(relative) & (moments.variance > 0)]
    return relative.square().mean().sqrt().nan_to_num(nan=1.0, posinf=1.0)


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

    The error is what other samples would scatter by. It doesn't have in it that sampling lowers every seller's score
    alike, so it serves to compare sellers, not to tell a score from 1.

    Args:
        buyer: its moments along the directions.
        seller: the seller's along the same.
        by: the name of a measure, of `MEASURES`.
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
    own = shares(buyer)
    kept = kept_directions(own, threshold)
    weight = weights(own, kept)
    value = float(measure(side(buyer), side(seller), kept, weight))
    if not draws:
        return Score(value, math.nan)
    generator = torch.Generator().manual_seed(seed)
    sample = measure(draw(buyer, draws, generator), draw(seller, draws, generator), kept, weight)
    return Score(value, float(sample.std()))


def measure_of(name: str) -> Measure:
    """Give a measure by its name; raises ValueError for another."""
    if name not in MEASURES:
        raise ValueError(f"a measure must be one of {', '.join(MEASURES)}, got {name!r}")
    return MEASURES[name]

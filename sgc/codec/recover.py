"""Sketch → (index, value): orthogonal matching pursuit and its faster kin."""

from __future__ import annotations

import torch
from torch import Tensor

from sgc.backends import stage
from sgc.codec.layout import Layout
from sgc.codec.project import Projection
from sgc.codec.sparsify import spread, top_entries, top_indices
from sgc.constants import RIDGE

METHODS = ("omp", "gomp", "threshold")
GOMP_PASSES = 4  # correlation passes of generalized OMP
BLOCK = 1 << 20  # entries of the largest temporary
ELIMINATED = 8  # systems of up to so many unknowns are solved all together, larger ones by LAPACK one after the other


@stage("recover")
def recover(
    sketch: Tensor,
    layout: Layout,
    projection: Projection,
    sparsity: int,
    method: str = "omp",
    *,
    take: bool = False,
) -> tuple[Tensor, Tensor]:
    """Recover the sparse entries of every chunk of a tensor; chunks whose sketch holds nothing cost nothing.

    Args:
        sketch: y, (c, k) fp32; changed in place with `take`.
        layout: the chunks.
        projection: A.
        sparsity: s', entries to recover in each chunk.
        method: as for `pursue`.
        take: whether what is recovered leaves the sketch: y ← y − A·x̂.

    Returns:
        index (c, s') int64, ascending in each chunk, and value (c, s') fp32.
    """
    lengths = layout.lengths(sketch.device)
    busy = sketch.abs().amax(1) != 0 if sketch.numel() else None  # `any` is several times slower on a CPU
    if busy is None or busy.all():
        index, value = pursue(sketch, layout.chunk, projection, sparsity, method, lengths)
    else:
        some = None if lengths is None else lengths[busy]
        index, value = spread(*pursue(sketch[busy], layout.chunk, projection, sparsity, method, some), busy)
    if take:
        sketch.sub_(projection.project(index, value, layout.chunk))
    return index, value


def pursue(
    sketch: Tensor, n: int, projection: Projection, sparsity: int, method: str = "omp", lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the sparse chunks that explain the sketches: y ≈ A[:, index]·value.

    Values are the least-squares values on the support (with a ridge of 1e-5), so y − A·x̂ is an orthogonal projection of
    y and never longer than y.

    Args:
        sketch: y, (c, k) fp32.
        n: entries of a chunk.
        projection: A.
        sparsity: s', entries to recover in each chunk, at most k and n.
        method: "omp", one entry per pass over A (Pati et al. 1993; the oracle); "gomp", several entries per pass (Wang
            et al. 2012); "threshold", one pass, the s' largest correlations.
        lengths: (c,) real entries in each chunk; positions beyond are never given a value.

    Returns:
        index (c, s') int64, ascending in each chunk, and value (c, s') fp32.
    """
    sparsity = min(sparsity, n)
    if projection.sketch_size >= n:
        return top_entries(sketch, sparsity)
    if method == "threshold":
        return threshold(sketch, n, projection, sparsity, lengths)
    passes = sparsity if method == "omp" else min(GOMP_PASSES, sparsity)
    return _pursue_in_blocks(sketch, n, projection, sparsity, passes, lengths)


@stage("recover")
def threshold(
    sketch: Tensor, n: int, projection: Projection, sparsity: int, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Recover by one pass over A: the s' largest correlations, and their least-squares values; as for `pursue`."""
    return _pursue_in_blocks(sketch, n, projection, sparsity, 1, lengths)


def _pursue_in_blocks(
    sketch: Tensor, n: int, projection: Projection, sparsity: int, passes: int, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    widest = max(n, sparsity * (sparsity if projection.holds(n) else projection.sketch_size))
    step = max(1, BLOCK // widest)
    grams = None
    if sparsity > 1 and n * n <= BLOCK and sketch.shape[0] * sparsity >= n:  # else it costs more than it saves
        signs = projection.columns(n, sketch.device).sign()
        grams = signs @ signs.T
    parts = []
    for start in range(0, sketch.shape[0], step):
        part = slice(start, start + step)
        length = None if lengths is None else lengths[part]
        parts.append(_pursuit(sketch[part], n, projection, sparsity, passes, length, grams))
    if not parts:
        return sketch.new_zeros((0, sparsity), dtype=torch.int64), sketch.new_zeros((0, sparsity))
    index, value = (torch.cat(part) if len(parts) > 1 else part[0] for part in zip(*parts, strict=True))
    index, order = index.sort(1)
    return index, value.gather(1, order)


def _pursuit(
    y: Tensor, n: int, projection: Projection, sparsity: int, passes: int, lengths: Tensor | None, grams: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Matching pursuit with ⌈s'/passes⌉ new entries and a full least squares after every pass."""
    index = y.new_zeros((y.shape[0], 0), dtype=torch.int64)
    value = y.new_zeros((y.shape[0], 0))
    correlation = projection.correlate(y, n)
    score = correlation.abs()
    for number in range(passes):
        more = sparsity * (number + 1) // passes - sparsity * number // passes
        if number:
            score = projection.correlate(y - projection.project(index, value, n), n).abs_()
        if lengths is not None:
            score.masked_fill_(torch.arange(n, device=y.device) >= lengths[:, None], -0.5)
        index = torch.cat([index, _best(score.scatter_(1, index, -1.0), more)], dim=1)
        real = None if lengths is None else index < lengths[:, None]
        right = correlation.gather(1, index)
        value = _solve(_gram(projection, index, n, grams, real), right if real is None else right * real)
    return index, value


def _best(score: Tensor, count: int) -> Tensor:
    return score.argmax(1, keepdim=True) if count == 1 else top_indices(score, count)


def _gram(projection: Projection, index: Tensor, n: int, grams: Tensor | None, real: Tensor | None) -> Tensor:
    """Return AᵀA at every pair of positions (c, s', s'), as exact multiples of 1/k; 0 where a position is not real."""
    if grams is None:
        signs = projection.gather(index, n).sign_()
        gram = signs @ signs.mT
    else:
        gram = grams.take(index[:, :, None] * n + index[:, None, :])
    gram *= 1 / projection.sketch_size
    return gram if real is None else gram * (real[:, :, None] & real[:, None, :])


def least_squares(
    sketch: Tensor, index: Tensor, n: int, projection: Projection, lengths: Tensor | None = None
) -> Tensor:
    """Solve for the values (c, s') that best explain the sketches (c, k) on a given support (c, s'); 0 on padding."""
    if projection.sketch_size >= n:
        return sketch.gather(1, index)
    real = None if lengths is None else index < lengths[:, None]
    right = torch.einsum("ck,csk->cs", sketch, projection.gather(index, n))
    return _solve(_gram(projection, index, n, None, real), right if real is None else right * real)


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """Solve (G + ridge) x = b for a batch of small symmetric systems (c, s', s') and (c, s'); b = 0, G = 0 gives 0."""
    count = right.shape[1]
    if count == 1:
        return right
    if count > ELIMINATED:
        gram.diagonal(dim1=1, dim2=2).add_(RIDGE)
        return torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky_ex(gram).L).squeeze(2)
    left, x = gram.permute(1, 2, 0).contiguous(), right.T.contiguous()  # vectors run over systems
    left.diagonal().add_(RIDGE)
    for at in range(count - 1):  # Gaussian elimination, which needs no pivoting where G is positive definite
        below = slice(at + 1, None)
        factor = left[at, below] / left[at, at]
        left[below, below] -= factor[:, None] * left[at, None, below]
        x[below] -= factor * x[at]
    for at in range(count - 1, -1, -1):
        x[at] /= left[at, at]
        x[:at] -= left[:at, at] * x[at]
    return x.T

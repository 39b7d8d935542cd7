"""Sketch → (index, value): orthogonal matching pursuit and its faster kin."""

from __future__ import annotations

import torch
from torch import Tensor

from sgc.codec.project import Projection
from sgc.codec.sparsify import top_entries

METHODS = ("omp", "gomp", "threshold")
GOMP_PASSES = 4  # correlation passes of generalized OMP
RIDGE = 1e-5  # keeps equal or opposite columns, common at small k, from making the least squares singular
_BLOCK = 1 << 20  # entries of the largest temporary


def recover(
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
    widest = max(n, sparsity * projection.sketch_size)
    step = max(1, _BLOCK // widest)
    passes = {"omp": sparsity, "gomp": min(GOMP_PASSES, sparsity), "threshold": 1}[method]
    parts = []
    for start in range(0, sketch.shape[0], step):
        part = slice(start, start + step)
        length = None if lengths is None else lengths[part]
        parts.append(_pursuit(sketch[part], n, projection, sparsity, passes, length))
    if not parts:
        return sketch.new_zeros((0, sparsity), dtype=torch.int64), sketch.new_zeros((0, sparsity))
    index, value = (torch.cat(part) if len(parts) > 1 else part[0] for part in zip(*parts, strict=True))
    index, order = index.sort(1)
    return index, value.gather(1, order)


def _pursuit(
    y: Tensor, n: int, projection: Projection, sparsity: int, passes: int, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Matching pursuit with ⌈s'/passes⌉ new entries and a full least squares after every pass."""
    index = y.new_zeros((y.shape[0], 0), dtype=torch.int64)
    value = y.new_zeros((y.shape[0], 0))
    rest = y
    for number in range(passes):
        more = sparsity * (number + 1) // passes - sparsity * number // passes
        score = projection.correlate(rest, n).abs_()
        if lengths is not None:
            score.masked_fill_(torch.arange(n, device=y.device) >= lengths[:, None], -1.0)
        score.scatter_(1, index, -2.0)
        index = torch.cat([index, _best(score, more)], dim=1)
        columns = projection.gather(index, n)
        if lengths is not None:
            columns = columns * (index < lengths[:, None])[:, :, None]
        value = _least_squares(columns, y)
        if number + 1 < passes:
            rest = y - torch.einsum("cs,csk->ck", value, columns)
    return index, value


def _best(score: Tensor, count: int) -> Tensor:
    return score.argmax(1, keepdim=True) if count == 1 else score.topk(count, dim=1, sorted=False).indices


def least_squares(
    sketch: Tensor, index: Tensor, n: int, projection: Projection, lengths: Tensor | None = None
) -> Tensor:
    """Solve for the values (c, s') that best explain the sketches (c, k) on a given support (c, s'); 0 on padding."""
    if projection.sketch_size >= n:
        return sketch.gather(1, index)
    columns = projection.gather(index, n)
    if lengths is not None:
        columns = columns * (index < lengths[:, None])[:, :, None]
    return _least_squares(columns, sketch)


def _least_squares(columns: Tensor, y: Tensor) -> Tensor:
    """Columns (c, s', k), y (c, k) → values (c, s')."""
    right = torch.einsum("ck,csk->cs", y, columns)
    return _solve(columns @ columns.mT, right) if columns.shape[1] > 1 else right


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """Solve (G + ridge) x = b for a batch of small symmetric systems; a zero column gets the value 0."""
    gram = gram.clone()
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE)
    factor = torch.linalg.cholesky_ex(gram).L
    return torch.cholesky_solve(right[:, :, None], factor).squeeze(2)

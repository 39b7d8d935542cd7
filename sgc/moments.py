"""The moment rules: pure functions on sketches, and the factored second moment. t counts the updates made, this one in.

| rule | state | what is recovered | whose |
|---|---|---|---|
| subspace | M, V (c, k) | M̂ / (√V̂ + ε) | a reading of arXiv 2502.00311 |
| sketched | M, V (c, k) | M̂; V̂ on its support | the other reading |
| whitened | M (c, k); R, C | M̂, of the whitened gradient | ours |
| residual | E (c, k); R, C | E, which then gives up what was recovered | ours |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

RULES = ("residual", "whitened", "sketched", "subspace")
FACTORED = ("residual", "whitened")  # rules that whiten the gradient before it is sketched
FLOOR = 1e-4  # R and C count for at least this share of their mean
CLIP = 3.0  # |w| of a whitened entry is at most this; Adam's own ratio rarely exceeds it
UNAVERAGED = 0.75  # `scale` where every entry moves without momentum: Adam's average over steps takes off some noise


def ema(moment: Tensor, new: Tensor, beta: float) -> Tensor:
    """Move a moment towards the new value, in place."""
    return moment.lerp_(new, 1 - beta)


def subspace(m: Tensor, v: Tensor, p: Tensor, betas: tuple[float, float], eps: float, t: int) -> Tensor:
    """Adam on the sketch: M ← EMA(p), V ← EMA(p²), y = M̂ / (√V̂ + ε).

    Args:
        m: M (c, k), changed in place.
        v: V (c, k), changed in place.
        p: A·top_s(g), (c, k).
        betas: β1, β2.
        eps: ε.
        t: updates made, from 1.

    Returns:
        y (c, k), to be recovered.
    """
    ema(m, p, betas[0])
    v.mul_(betas[1]).addcmul_(p, p, value=1 - betas[1])
    root = (v.sqrt() / (1 - betas[1] ** t) ** 0.5).add_(eps)
    return m / (1 - betas[0] ** t) / root


def sketched(m: Tensor, v: Tensor, p: Tensor, q: Tensor, betas: tuple[float, float], t: int) -> tuple[Tensor, Tensor]:
    """Sketches of both moments: M ← EMA(p), V ← EMA(q).

    Args:
        m: M (c, k), changed in place.
        v: V (c, k), changed in place.
        p: A·top_s(g), (c, k).
        q: A·(top_s(g))², (c, k).
        betas: β1, β2.
        t: updates made, from 1.

    Returns:
        M̂ and V̂ (c, k), the first to be recovered, the second to be solved for on its support.
    """
    return ema(m, p, betas[0]) / (1 - betas[0] ** t), ema(v, q, betas[1]) / (1 - betas[1] ** t)


def sketched_ratio(
    m: Tensor, v: Tensor, real: Tensor | None, eps: float, total: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """u = m̂ / (√v̂ + ε), with v̂ floored at max(m̂², mean of v̂ over the recovered entries of the tensor).

    Args:
        m: m̂ recovered, (c, s').
        v: v̂ solved for on the same support, (c, s'), 0 on padding.
        real: which of them are no padding, (c, s'); None: all.
        eps: ε.
        total: where these are a shard's entries, sums the tensor's sum and count over the shards.
    """
    count = torch.tensor(v.numel(), device=v.device) if real is None else real.sum()
    sums = torch.stack([v.clamp(min=0).sum(), count])
    mean, count = sums if total is None else total(sums)
    mean = mean / count
    floor = torch.maximum(m.square(), mean)
    return m / (torch.maximum(v, floor).sqrt() + eps)


def whitened(m: Tensor, p: Tensor, beta1: float, t: int) -> Tensor:
    """Momentum of the whitened gradient: M ← EMA(p), y = M̂, all (c, k), M in place."""
    return ema(m, p, beta1) / (1 - beta1**t)


def residual(e: Tensor, p: Tensor, decay: float) -> Tensor:
    """What is still to be applied: E ← ρE + p, all (c, k), E in place. The caller takes out what it recovers."""
    return e.mul_(decay).add_(p)


def factor(
    row: Tensor,
    col: Tensor,
    row_mean: Tensor,
    col_mean: Tensor,
    beta2: float,
    t: int,
    mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Update the factored second moment and give its root: √v̂ᵢⱼ = aᵢ·bⱼ. (after Adafactor, arXiv 1804.04235)

    R and C are bias-corrected EMAs of the row and column means of g², this gradient in, and are floored at 1e-4 of
    their mean: v̂ᵢⱼ = R̂ᵢ·Ĉⱼ / mean(R̂).

    Args:
        row: R, of rows entries in any shape, changed in place.
        col: C (cols,), changed in place.
        row_mean: means of g² along the rows, (rows,).
        col_mean: means of g² along the columns, (cols,).
        beta2: β2.
        t: updates made, from 1.
        mean: of all of R after this update, where `row` is a shard of it; None: that of `row`.

    Returns:
        a (rows,) and b (cols,).
    """
    correction = 1 - beta2**t
    row_hat = ema(row.view(-1), row_mean, beta2) / correction
    col_hat = ema(col, col_mean, beta2) / correction
    mean = row_hat.mean() if mean is None else mean / correction
    mean = mean.clamp(min=torch.finfo(torch.float32).tiny)  # squares of 1e-22 vanish
    row_hat = torch.maximum(row_hat, FLOOR * mean)
    col_hat = torch.maximum(col_hat, FLOOR * col_hat.mean())
    return (row_hat / mean).sqrt(), col_hat.sqrt()


def update_scale(entries: int, chunks: int, chunk: int, group: Mapping[str, Any]) -> float:
    """Give `scale`, or where it is None what makes AdamW's learning rate carry over. (ours)

    AdamW moves every entry by about lr; here s' of each chunk move, and √(entries / moved) gives the update the same
    norm. Where every entry moves by a rule that does not average over steps ("residual", or no sketch), ¾ of that.

    Args:
        entries: of the tensor.
        chunks: c.
        chunk: n.
        group: the hyperparameters.
    """
    if group["scale"] is not None:
        return float(group["scale"])
    moved = min(entries, chunks * min(group["recovered"] or chunk, chunk))  # chunks may be padded
    averages = group["moments"] != "residual" and group["sketch_size"] > 0
    return UNAVERAGED if moved == entries and not averages else math.sqrt(entries / moved)

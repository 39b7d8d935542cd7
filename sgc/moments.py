"""The moment rules: what each holds of a tensor's sketches, how it moves, and what is to be recovered from it.

| rule | state | what is recovered | whose |
|---|---|---|---|
| residual | E (c, k); R, C | E, which then gives up what was recovered | ours |
| whitened | M (c, k); R, C | M̂, of the whitened gradient | ours |
| sketched | M, V (c, k) | M̂; V̂ on its support | a reading of arXiv 2502.00311 |
| subspace | M, V (c, k) | M̂ / (√V̂ + ε) | the other reading |

A rule is one entry of `RULES`: nothing else in the project knows a rule by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNAVERAGED = 0.75  # `scale` where every entry moves without momentum: Adam's average over steps takes off some noise
FIRST = "sketch"  # every rule's first moment, in the state; what is recovered is recovered from this
SQUARE_OF_SKETCH = "sketch_sq"  # V of "subspace", the EMA of p²
SKETCH_OF_SQUARE = "square_sketch"  # V of "sketched", the EMA of A·(top_s)²


class Rates(NamedTuple):
    """What a step multiplies by, worked out once for a tensor."""

    lr: float  # times `scale`, negative to maximize
    decay: float  # learning rate times weight decay
    eps: float
    betas: tuple[float, float]
    t: int  # updates made, from 1, this one in


Held = Mapping[str, Tensor]  # the moments of a tensor in fp32, (c, k) each, by their names in the state


@dataclass(frozen=True)
class Rule:
    """What one moment rule holds, how it moves it, and what it makes of what is recovered.

    Attributes:
        held: names of its moments in the state.
        move: (held, p, q, rates) → None: move the moments in place by the sketch p of a gradient, and q of its square.
        target: (held, rates) → y (c, k): what is to be recovered.
        whitens: whether the gradient is whitened by R and C before it is sketched.
        averages: whether what is recovered is an average over steps, as AdamW's update is.
        gives_up: whether what is recovered leaves the first moment, which is the target itself then.
        square: (held, rates) → V̂ (c, k), a sketch of squares: what is recovered is divided by the root of the values
            that it has on the recovered support (`sketched_ratio`); None: it is not.
    """

    held: tuple[str, ...]
    move: Callable[[Held, Tensor, Tensor | None, Rates], None]
    target: Callable[[Held, Rates], Tensor]
    whitens: bool = False
    averages: bool = True
    gives_up: bool = False
    square: Callable[[Held, Rates], Tensor] | None = None


def ema(moment: Tensor, new: Tensor, beta: float) -> Tensor:
    """Move a moment towards the new value, in place."""
    return moment.lerp_(new, 1 - beta)


def _add(held: Held, p: Tensor, q: Tensor | None, rates: Rates) -> None:
    """E ← ρE + p: what is still to be applied."""
    held[FIRST].mul_(rates.betas[0]).add_(p)


def _average(held: Held, p: Tensor, q: Tensor | None, rates: Rates) -> None:
    """M ← EMA(p)."""
    ema(held[FIRST], p, rates.betas[0])


def _average_with_square(held: Held, p: Tensor, q: Tensor | None, rates: Rates) -> None:
    """M ← EMA(p), V ← EMA(p²)."""
    ema(held[FIRST], p, rates.betas[0])
    held[SQUARE_OF_SKETCH].mul_(rates.betas[1]).addcmul_(p, p, value=1 - rates.betas[1])


def _average_both(held: Held, p: Tensor, q: Tensor | None, rates: Rates) -> None:
    """M ← EMA(p), V ← EMA(q)."""
    assert q is not None  # sketched for rules with a `square`
    ema(held[FIRST], p, rates.betas[0])
    ema(held[SKETCH_OF_SQUARE], q, rates.betas[1])


def _itself(held: Held, rates: Rates) -> Tensor:
    return held[FIRST]


def _mean(held: Held, rates: Rates) -> Tensor:
    """M̂ = M / (1 − β1ᵗ)."""
    return held[FIRST] / (1 - rates.betas[0] ** rates.t)


def _mean_square(held: Held, rates: Rates) -> Tensor:
    """V̂ = V / (1 − β2ᵗ)."""
    return held[SKETCH_OF_SQUARE] / (1 - rates.betas[1] ** rates.t)


def _adam(held: Held, rates: Rates) -> Tensor:
    """M̂ / (√V̂ + ε), Adam on the sketch."""
    root = (held[SQUARE_OF_SKETCH].sqrt() / (1 - rates.betas[1] ** rates.t) ** 0.5).add_(rates.eps)
    return _mean(held, rates) / root


RULES = {
    "residual": Rule((FIRST,), _add, _itself, whitens=True, averages=False, gives_up=True),
    "whitened": Rule((FIRST,), _average, _mean, whitens=True),
    "sketched": Rule((FIRST, SKETCH_OF_SQUARE), _average_both, _mean, square=_mean_square),
    "subspace": Rule((FIRST, SQUARE_OF_SKETCH), _average_with_square, _adam),
}


def sketched_ratio(m: Tensor, v: Tensor, mean: Tensor, eps: float) -> Tensor:
    """u = m̂ / (√v̂ + ε), with v̂ floored at max(m̂², mean of v̂ over the recovered entries of the tensor).

    Args:
        m: m̂ recovered, (c, s').
        v: v̂ solved for on the same support, (c, s').
        mean: of the positive part of v̂ over the tensor, () shaped.
        eps: ε.
    """
    floor = torch.maximum(m.square(), mean)
    return m / (torch.maximum(v, floor).sqrt() + eps)


def adamw(state: Mapping[str, Tensor], gradient: Tensor, rates: Rates) -> Tensor:
    """Return AdamW's update of a tensor that is not compressed, in fp32: m̂ / (√v̂ + ε), its moments moved in place."""
    (beta1, beta2), t, gradient = rates.betas, rates.t, gradient.float()
    m = ema(state["exp_avg"], gradient, beta1)
    v = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    return (m / (1 - beta1**t)).div_((v.sqrt() / (1 - beta2**t) ** 0.5).add_(rates.eps))


def update_scale(entries: int, chunks: int, chunk: int, group: Mapping[str, Any]) -> float:
    """Return `scale`, or where it is None what makes AdamW's learning rate carry over. (ours)

    AdamW moves every entry by about lr; here s' of each chunk move, and √(entries / moved) gives the update the same
    norm. Where every entry moves by a rule that does not average over steps (or without a sketch), ¾ of that.

    Args:
        entries: of the tensor.
        chunks: c.
        chunk: n.
        group: the hyperparameters.
    """
    if group["scale"] is not None:
        return float(group["scale"])
    moved = min(entries, chunks * min(group["recovered"] or chunk, chunk))  # chunks may be padded
    averages = group["sketch_size"] > 0 and RULES[group["moments"]].averages
    return UNAVERAGED if moved == entries and not averages else math.sqrt(entries / moved)

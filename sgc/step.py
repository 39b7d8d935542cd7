"""One update of one tensor, the stages in order: whiten, sparsify and project, move the moments, recover, apply."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from sgc.codec.recover import least_squares, recover
from sgc.moments import Rates, adamw, sketched_ratio
from sgc.state import read_held, write_held
from sgc.views import View
from sgc.whiten import whiten

PROBED_CHUNKS = 16  # chunks of a tensor that a probe looks at


@dataclass(frozen=True)
class Recovered:
    """The sparse update u of a tensor, before `scale` and lr."""

    index: Tensor  # (c, s') positions inside the chunks
    value: Tensor  # (c, s') fp32
    target: Tensor | None  # what the first chunks were recovered from, (PROBED_CHUNKS, k), for a probe


Update = Generator[list[Tensor], list[Tensor], Recovered | None]


def update(view: View, rates: Rates) -> Update:
    """Make one update of a tensor, or of the part of it that this process holds.

    A generator, so that one message between ranks can serve many tensors: where ranks hold parts of a tensor, it yields
    what has to be summed over them and is sent the sums. `finish` runs one that has nothing to sum.

    Args:
        view: the tensor, its gradient, finite and not all zero, and its state; both tensor and state are changed.
        rates: what the step multiplies by.

    Returns:
        The sparse update that was applied; None where every entry has moved.
    """
    if view.layout is None:  # too small to be compressed
        view.move(adamw(view.state, view.gradient, rates), rates)
        return None

    # whiten: √v̂ᵢⱼ = aᵢ·bⱼ from R and C, this gradient in
    rule, whitening = view.rule, None
    if rule.whitens:
        row, col, mean = view.statistics()
        whitening = view.in_sight(whiten(view.state, row, col, rates.betas[1], rates.eps, rates.t, mean))
    recovered = view.group["recovered"]
    if recovered is None:  # there is no sketch: every entry moves by the whitened gradient
        assert whitening is not None  # a rule without R and C has a sketch
        view.move_whitened(whitening, rates)
        return None

    if view.projection is None:  # without a sketch what is selected is the update
        found = Recovered(*view.select(whitening, recovered), None)
    else:
        # sparsify and project: p = A·top_s(w), and of some rules q = A·top_s(w)²
        p, q = yield from view.encode(whitening, squares=rule.square is not None)

        # moments: they live in the sketch
        held = {name: read_held(view.state, name) for name in rule.held}
        rule.move(held, p, q, rates)
        del p, q  # as large as the moments

        # recover: the s' entries of each chunk that explain the sketch
        target = rule.target(held, rates)
        before = target[:PROBED_CHUNKS].clone()
        arguments = view.chunks, view.projection, recovered, view.group["recovery"]
        index, value = recover(target, *arguments, take=rule.gives_up)
        if rule.square is not None:
            value = yield from _divide(view, index, value, rule.square(held, rates), rates.eps)
        for name in reversed(rule.held):
            write_held(view.state, name, held[name], view.tools.generator)
        found = Recovered(index, value, before)

    # apply: W ← (1 − decay)·W − lr·u
    view.apply(found.index, found.value, rates)
    return found


def _divide(
    view: View, index: Tensor, value: Tensor, square: Tensor, eps: float
) -> Generator[list[Tensor], list[Tensor], Tensor]:
    """Divide what was recovered by the root of the second moment on its support, given the sketch of that."""
    assert view.projection is not None  # there is a sketch
    v = least_squares(square, index, view.chunks.chunk, view.projection, view.chunks.lengths(index.device))
    total, count = yield from view.total(v.clamp(min=0), index)
    return sketched_ratio(value, v, total / count, eps)


def finish(one: Update) -> Recovered | None:
    """Run the update of a tensor of which no other rank holds a part."""
    try:
        next(one)
    except StopIteration as ended:
        result: Recovered | None = ended.value
        return result
    raise RuntimeError("ranks hold parts of this tensor: its update has something to sum over them")

"""A step of a model of many equal blocks, from traces of models with two, three and four of them.

What two blocks more change in the record of a step is one block's forward and one block's backward, put in between. So
the step of a model with any number of blocks is arithmetic. It holds where all blocks (or all groups of a few that
alternate) are alike; the record of four blocks must be what that of two and three foretells, or else all is traced.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from sgc.planner.models import PlanError
from sgc.planner.trace import Held, Run, Trace, trace

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

LEAST = 5  # groups of blocks for which tracing nine is less than tracing all
Adapt = Callable[["PreTrainedModel"], nn.Module]


@dataclass(frozen=True)
class Blocks:
    """The repeated blocks of a model."""

    prefix: str  # of their names, as "model.layers."
    count: int
    period: int  # blocks of a group; groups are alike


def trace_by_blocks(run: Run, model: PreTrainedModel, adapt: Adapt | None = None) -> Trace:
    """Trace forward and backward of one batch as `trace` does, by the blocks of the model where that is enough.

    Args:
        run: the step.
        model: as it will be trained, on the meta device.
        adapt: as for `trace`.
    """
    blocks = blocks_of(model)
    if blocks is None or blocks.count < LEAST * blocks.period:
        return trace(run, adapt)
    try:
        few = [trace(replace(run, config=_with_blocks(run.config, n * blocks.period)), adapt) for n in (2, 3, 4)]
    except PlanError:  # the model as it is may take the batch, or says why not
        return trace(run, adapt)
    growth = _growth(few[0], few[1], blocks)
    if growth is None or growth.expanded(4) != few[2]:
        return trace(run, adapt)
    return growth.expanded(blocks.count // blocks.period)


def blocks_of(model: PreTrainedModel) -> Blocks | None:
    """Find the repeated blocks of a decoder or encoder, or None where its blocks differ, or are of several kinds."""
    config = model.config
    count = getattr(config, "num_hidden_layers", None)
    if not count:
        return None
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lists = [(name, module) for name, module in lists if len(module) == count]
    if config.is_encoder_decoder or config.get_text_config() is not config or len(lists) != 1:
        return None
    (name, modules), types = lists[0], getattr(config, "layer_types", None)
    own = [value for key, value in config.to_dict().items() if key != "layer_types" and isinstance(value, list | tuple)]
    if any(len(value) == count for value in own) or (types is not None and len(types) != count):
        return None  # something else is said of every block
    shapes = [(_described(module), None if types is None else types[at]) for at, module in enumerate(modules)]
    period = next(p for p in range(1, count + 1) if count % p == 0 and shapes == shapes[:p] * (count // p))
    return Blocks(f"{name}.", count, period)


def _described(module: nn.Module) -> list[Any]:
    parts = [(name, type(part).__name__) for name, part in module.named_modules()]
    return [*parts, *((name, tuple(param.shape), param.dtype) for name, param in module.named_parameters())]


def _with_blocks(config: PretrainedConfig, count: int) -> PretrainedConfig:
    few = copy.deepcopy(config)
    few.num_hidden_layers = count
    if vars(few).get("layer_types") is not None:  # of some a property that counts the blocks
        few.layer_types = few.layer_types[:count]
    return few


def _steps(traced: Trace) -> list[Held]:
    """List what every moment adds to the one before."""
    return [Held(*(b - a for a, b in zip(*pair, strict=True))) for pair in itertools.pairwise(traced.moments)]


@dataclass(frozen=True)
class _Growth:
    """How the record of a step grows by a group of blocks."""

    two: Trace  # of two groups
    three: Trace
    blocks: Blocks
    more: Held  # what is held from the start for a group
    unreached: int
    forward: list[Held]  # what the moments of a group's forward add,
    at: int  # and where it begins in the steps of `two`
    backward: list[Held]
    after: int  # steps of `two` from which nothing is put in between any more

    def expanded(self, groups: int) -> Trace:
        """Make the record of a model with so many groups of blocks."""
        steps, extra = _steps(self.two), groups - 2
        steps = [
            *steps[: self.at],
            *self.forward * extra,
            *steps[self.at : self.after],
            *self.backward * extra,
            *steps[self.after :],
        ]
        first = Held(*(a + extra * b for a, b in zip(self.two.moments[0], self.more, strict=True)))
        sums = itertools.accumulate(steps, lambda held, step: held.plus(**step._asdict()), initial=first)
        params, arrivals = list(self._params(groups)), {}
        for info in params:
            arrived = self._arrival(info.name, groups)
            if arrived is not None:
                arrivals[info.name] = arrived
        in_order = dict(sorted(arrivals.items(), key=lambda pair: pair[1]))
        return Trace(params, list(sums), in_order, self.two.unreached + extra * self.unreached)

    def _place(self, name: str) -> tuple[str, int, str] | None:
        """Split the name of a parameter of a block around the number of its block."""
        before, found, after = name.partition(self.blocks.prefix)
        number, _, rest = after.partition(".")
        return (before + found, int(number), rest) if found and number.isdigit() else None

    def _params(self, groups: int) -> Any:
        """List the parameters in their order."""
        placed = [(info, self._place(info.name)) for info in self.two.params]
        inside = [at for at, (_, place) in enumerate(placed) if place is not None]
        yield from (info for info, _ in placed[: inside[0]])
        group = [(info, place) for info, place in placed if place is not None and place[1] < self.blocks.period]
        for number in range(groups):
            for info, (before, at, rest) in group:
                yield replace(info, name=f"{before}{number * self.blocks.period + at}.{rest}")
        yield from (info for info, _ in placed[inside[-1] + 1 :])

    def _arrival(self, name: str, groups: int) -> int | None:
        """Find the moment in which a parameter has its gradient."""
        place, extra, later = self._place(name), groups - 2, 0
        if place is not None:  # later blocks have theirs earlier
            before, number, rest = place
            group, at = divmod(number, self.blocks.period)
            own = min(group, 1)  # backward of the first group may end early
            name, later = f"{before}{own * self.blocks.period + at}.{rest}", (own - group) * len(self.backward)
        if name not in self.two.arrivals:
            return None
        first, second = self.two.arrivals[name], self.three.arrivals[name]
        return first + extra * (second - first) + later


def _growth(two: Trace, three: Trace, blocks: Blocks) -> _Growth | None:
    """Find what a third group of blocks puts in between, or None where it changes more."""
    a, b = _steps(two), _steps(three)
    same = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
    at = len(same)
    more = len(b) - len(a)
    tail = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(a), reversed(b), strict=False)))
    after = max(at, len(a) - len(tail))
    middle = a[at:after]
    for length in range(more + 1):
        if b[at + length : at + length + len(middle)] == middle:
            start = at + length + len(middle)
            started = Held(*(y - x for x, y in zip(two.moments[0], three.moments[0], strict=True)))
            unreached = three.unreached - two.unreached
            backward = b[start : start + more - length]
            return _Growth(two, three, blocks, started, unreached, b[at : at + length], at, backward, after)
    return None

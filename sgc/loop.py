"""The step loop: where each tensor lies, what its update is lent, and the updates of all tensors in their order."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sgc.arguments import CONFIGURATION, check_param, rates_of
from sgc.backward.gradient import CompressedGradient
from sgc.backward.view import HeldView
from sgc.batches import Batches
from sgc.codec.project import Projection, mix
from sgc.gradients import norms_of
from sgc.moments import Rates, update_scale
from sgc.parallel import harnesses
from sgc.parallel.home import Given, Home
from sgc.probes import Probes
from sgc.state import DTYPES, NAMES
from sgc.step import finish, update
from sgc.views import Tools, View

State = dict[Tensor, dict[str, Any]]  # of an optimizer


class StepLoop:
    """What one optimizer keeps beside its state, from step to step.

    Args:
        given: the tensors that the optimizer was made with.
    """

    def __init__(self, given: Given) -> None:
        self.harnesses = harnesses(given)
        self.probes = Probes()
        self.batches = Batches(self.probes)
        self.projections: dict[tuple[int, int], Projection] = {}  # by sketch_size and seed
        self.steps = 0
        self._judged: dict[Tensor, tuple[Any, ...]] = {}  # for what shape and sizes a state was found to be right

    def home(self, number: int, param: Tensor, group: dict[str, Any], name: str) -> Home:
        """Find where a tensor lies: whole here, unless a harness holds parts of it."""
        for harness in self.harnesses:
            home = harness.home(number, param, group, name)
            if home is not None:
                home.harness = harness
                return home
        return Home(number, param, group, name)

    def run(self, homes: Sequence[Home], groups: Sequence[dict[str, Any]], state: State) -> None:
        """Make one update of every tensor.

        Args:
            homes: of the tensors that have a gradient.
            groups: of the optimizer.
            state: of the optimizer.
        """
        homes = self._begin(homes, groups, state)
        work = [(home, self._views(home, state)) for home in homes]
        parts = [(home, views) for home, views in work if home.harness is not None]
        for harness in self.harnesses:
            harness.measure([(home, views) for home, views in parts if home.harness is harness])
        self.batches.settle(wait=False)
        whole = [view for home, views in work if home.harness is None for view in views]
        whole, taken = self.batches.split(whole, state, rates_before)
        if whole or parts:
            self.batches.settle()
        norms = norms_of([*whole, *(view for _, views in parts for view in views)])
        for view in whole:
            if moves(view, norms[view]):
                self.probes.look(view, finish(update(view, rates_now(view))))
        for harness in self.harnesses:
            moving = [
                (home, {view: update(view, rates_now(view)) for view in views if moves(view, norms[view])})
                for home, views in parts
                if home.harness is harness
            ]
            for view, found in harness.run(moving).items():
                self.probes.look(view, found)
        self.batches.update(taken, list(norms.values()), seen_whole=not any(home.flat for home in homes))

    def _begin(self, homes: Sequence[Home], groups: Sequence[dict[str, Any]], state: State) -> Sequence[Home]:
        """Count a step, and return the tensors that take part in it: DeepSpeed steps for one partition at a time."""
        flat = [home for home in homes if home.flat]
        for home in flat:
            home.group["steps"] += 1
            self.steps = home.group["steps"]
            self.probes.begin(self.steps)
        if flat:
            return flat
        for home in homes:
            self._check_sizes(home, state)
        self.steps += 1
        self.probes.begin(self.steps)
        for group in groups:
            group["steps"] += 1
        return homes

    def _check_sizes(self, home: Home, state: State) -> None:
        """Raise unless a tensor can be trained with its group's sizes: either may have changed since it was added."""
        sizes = (home.param.shape, *(home.group[name] for name in CONFIGURATION))
        if self._judged.get(home.param) == sizes:
            return
        check_param((home.name, home.param), home.number, home.group)
        if home.harness is None:
            home.check_state(state.get(home.param, {}), "it")
        self._judged[home.param] = sizes

    def _views(self, home: Home, state: State) -> list[View]:
        """View what the gradient of a tensor is to update."""
        gradient, held = home.param.grad, functools.partial(state_of, home, state)
        if isinstance(gradient, CompressedGradient):
            return [HeldView(home.param, gradient, held, home.group, self._lend(home.number, home.param, home.group))]
        assert gradient is not None  # tensors without one take no part
        return home.views(gradient, held, self._lend)

    def _lend(self, number: int, weight: Tensor, group: Mapping[str, Any], streams: tuple[int, int] = (0, 0)) -> Tools:
        """Lend a tensor's update A, and random numbers that a resumed run draws again.

        What ranks hold of a sharded tensor differs in its stream, so its rounding depends on the number of ranks.
        """
        seed = mix(mix(mix(group["seed"] & 0xFFFFFFFF) ^ number) ^ group["steps"])
        draws = weight.dtype is torch.bfloat16 or DTYPES[group["state_dtype"]].draws
        device = weight.device if draws else None
        return Tools(self.projection(group), seed, device, group["stochastic_rounding"], streams)

    def projection(self, group: Mapping[str, Any]) -> Projection | None:
        """Return the A that the tensors of a group share, or None where there is no sketch."""
        key = (group["sketch_size"], group["seed"])
        if key[0] and key not in self.projections:
            self.projections[key] = Projection(*key)
        return self.projections.get(key)


def state_of(home: Home, state: State) -> dict[str, Any]:
    """Return the state of a tensor, made where there is none."""
    held = state[home.param]
    if not home.holds(held):
        for name in NAMES & held.keys():
            del held[name]
        held.update(home.new_state())
    return held


def moves(view: View, norm: float) -> bool:
    """Return whether a tensor moves, given ‖g‖; one whose gradient is all zero only decays."""
    if norm == 0:
        view.state  # noqa: B018  # is made, as by any finite gradient
        view.move(None, rates_before(view))
    return math.isfinite(norm) and norm > 0


def rates_now(view: View) -> Rates:
    """Count an update of a tensor, and work out what it multiplies by."""
    view.state["step"] += 1
    return rates_before(view)._replace(t=int(view.state["step"]))


def rates_before(view: View) -> Rates:
    """Work out what an update multiplies by, before it is counted."""
    (lr, decay), layout, group = rates_of(view.group), view.layout, view.group
    if layout is not None:
        lr *= update_scale(math.prod(view.shape), layout.chunks, layout.chunk, group)
    return Rates(lr, decay, group["eps"], group["betas"], 0)

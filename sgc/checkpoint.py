"""Checkpoints of the optimizer: all of one is judged before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from sgc.arguments import CONFIGURATION, FACTOR, check_group
from sgc.backward.compressor import Compressor
from sgc.checks import plain, rate, shown, whole
from sgc.parallel.home import PENDING, Home


class Loading:
    """A checkpoint on its way into an optimizer.

    Args:
        homes: gives those of all tensors of the optimizer, in the order of their numbers.
        groups: of the optimizer.
        compressor: of gradients, or None.
    """

    def __init__(
        self, homes: Callable[[], list[Home]], groups: list[dict[str, Any]], compressor: Compressor | None
    ) -> None:
        self._homes_of, self._groups, self._compressor = homes, groups, compressor
        self._own: dict[int, dict[str, Any]] = {}  # state that is ours, by the number of its tensor
        self._pending: dict[int, Tensor] = {}  # compressed gradients

    def take_own(self, _: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Judge a checkpoint and take out what is ours; torch casts what it loads to the parameter's dtype.

        Returns:
            The checkpoint for torch to load: groups complete, parameters numbered.

        Raises:
            ValueError: it is damaged, of another configuration, or holds a tensor of another shape or dtype.
            TypeError: a hyperparameter in it is of another kind.
        """
        homes = dict(enumerate(self._homes_of()))
        state_dict = self._checked(state_dict, homes)
        others = {}
        for number, held in state_dict["state"].items():
            if number not in homes:
                others[number] = held  # of any kind
                continue
            names = homes[number].own_names(held)
            if PENDING in names:
                self._pending[number] = held[PENDING]
            self._own[number] = {name: value for name, value in held.items() if name in names and name != PENDING}
            others[number] = {name: value for name, value in held.items() if name not in names} if names else held
        return {**state_dict, "state": others}

    def put_own(self, optimizer: Any) -> None:
        """Put what is ours into the state of the optimizer, which torch has loaded."""
        for number, home in enumerate(self._homes_of()):
            if self._own.get(number):
                optimizer.state[home.param].update(home.load(self._own[number]))
        if self._compressor is not None:
            self._compressor.restore(self._pending)

    def _checked(self, state_dict: dict[str, Any], homes: Mapping[int, Home]) -> dict[str, Any]:
        """Return a checkpoint, all of it judged, with numbered parameters and whole groups."""
        groups, state = state_dict.get("param_groups"), state_dict.get("state")
        if not isinstance(groups, list | tuple) or not isinstance(state, dict) or not all(map(_is_group, groups)):
            raise ValueError(
                'the checkpoint is damaged: an optimizer\'s has "state", a dict, and "param_groups", a list of dicts '
                f'with "params"; this one holds {shown(state_dict)}'
            )
        state_dict = _numbered(state_dict)
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in self._groups]:
            return state_dict  # torch says this well
        pairs = zip(self._groups, state_dict["param_groups"], strict=True)
        checked = [_checked_group(number, own, saved) for number, (own, saved) in enumerate(pairs)]
        for number, held in state_dict["state"].items():
            if isinstance(number, int):
                if number not in homes:
                    raise ValueError(f"the checkpoint holds a state of parameter {number}, its groups have no such one")
                self._check_state(homes[number], held)
        return {**state_dict, "param_groups": checked}

    def _check_state(self, home: Home, held: Any) -> None:
        if not isinstance(held, dict):
            raise ValueError(f"the state of {home.name} should be a dict, the checkpoint holds {shown(held)}")
        if PENDING in held and self._compressor is None:
            raise ValueError(
                "the checkpoint was written in the middle of an accumulation and holds compressed gradients: call "
                "optimizer.attach(model) before it is loaded"
            )
        home.check_state(held, "the checkpoint")


def saved_form(state_dict: dict[str, Any], pending: Mapping[int, Tensor]) -> dict[str, Any]:
    """Return torch's state dict of an optimizer as it is saved.

    Args:
        state_dict: of `torch.optim.Optimizer`.
        pending: compressed gradients of an accumulation under way, by the number of their tensor.
    """
    state_dict["param_groups"] = [
        {name: _saved(value) for name, value in group.items()} | {FACTOR: float(group.get(FACTOR, 1.0))}
        for group in state_dict["param_groups"]
    ]
    if pending:
        state = dict(state_dict["state"])
        for number, gradient in pending.items():
            state[number] = {**state.get(number, {}), PENDING: gradient}
        state_dict["state"] = state
    return state_dict


def kept_state(every: Mapping[Any, Any], here: Iterable[Tensor]) -> dict[Any, Any]:
    """Return the state but that of tensors whose group was removed: torch has no place for it in a checkpoint."""
    members = set(here)
    return {key: held for key, held in every.items() if key in members or not isinstance(key, Tensor)}


def _saved(value: Any) -> Any:
    """Return what is in a group without NumPy's numbers, which torch.load(weights_only=True) refuses."""
    if type(value) in (tuple, list):
        return type(value)(map(_saved, value))
    return value if isinstance(value, Tensor) else plain(value)


def _is_group(group: Any) -> bool:
    return isinstance(group, dict) and isinstance(group.get("params"), list | tuple)


def _checked_group(number: int, own: Mapping[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Return the group of a checkpoint, judged, and completed by what only this version of SGC has."""
    for name in CONFIGURATION:
        if name not in saved:
            raise ValueError(f"the checkpoint is not one of SGC's: its parameter groups have no {name}")
    merged = {name: value for name, value in own.items() if name not in ("params", "param_names")} | saved
    try:
        check_group(merged)
        merged["steps"] = whole("steps", merged["steps"], at_least=0)
        merged[FACTOR] = rate(FACTOR, saved.get(FACTOR, 1.0))
        if not merged[FACTOR]:
            raise ValueError(f"{FACTOR} must be positive, got 0")
    except (TypeError, ValueError) as error:
        raise type(error)(f"parameter group {number} of the checkpoint is damaged: {error}") from None
    for name in CONFIGURATION:
        if merged[name] != own[name]:
            raise ValueError(f"the checkpoint was written with {name}={merged[name]}, this SGC has {own[name]}")
    return merged


def _numbered(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Number the parameters of a checkpoint, where torch.distributed.checkpoint has put their names."""
    groups: list[dict[str, Any]] = []
    numbers: dict[Any, int] = {}
    for group in state_dict["param_groups"]:
        first = len(numbers)
        numbers |= {key: first + at for at, key in enumerate(group["params"])}
        groups.append({**group, "params": list(range(first, len(numbers)))})
    state = {numbers.get(key, key): held for key, held in state_dict["state"].items()}
    return {**state_dict, "param_groups": groups, "state": state}

"""Where a tensor that the optimizer is given lies: whole in this process, unless a harness says otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sgc.checks import shown
from sgc.state import NAMES, Schema, new_state, schema_bytes, state_schema
from sgc.step import Recovered, Update
from sgc.views import Tools, View, view_of

PENDING = "pending"  # in a checkpoint, beside the state of a tensor: its compressed gradient
Lend = Callable[..., Tools]  # (number of the tensor, its weight, its group, streams of random numbers)


class Given(list[list[Tensor]]):
    """The lists of tensors that an optimizer was made with, as DeepSpeed puts others in the place of them.

    These lists hold no parameter alive that a harness has taken out of its list, and unlike weak references let torch
    swap the contents of one.
    """

    def look(self) -> None:
        """Learn which tensors are in the lists now."""
        self.ids = {id(tensor) for tensor in self.tensors()}

    def tensors(self) -> list[Tensor]:
        """List the tensors, in the order of their numbers."""
        return [tensor for tensors in self for tensor in tensors]


class Home:
    """One tensor as the optimizer is given it: its state, how that is checked and loaded, and its views at a step.

    Args:
        number: of the tensor among all of the optimizer's.
        param: the tensor.
        group: its hyperparameters.
        name: for errors.
    """

    harness: Any = None  # who holds parts of the tensor, of `sgc.parallel`
    flat = False  # whether it stands for many tensors, and a harness has the optimizer step for it alone

    def __init__(self, number: int, param: Tensor, group: dict[str, Any], name: str) -> None:
        self.number, self.param, self.group, self.name = number, param, group, name

    def schema(self) -> Schema:
        """Name every tensor of the state that this process holds, with its shape and dtype."""
        return state_schema(self.param.shape, self.group)

    def new_state(self) -> dict[str, Any]:
        """Make the state, all zero."""
        return new_state(self.schema(), self.param.device)

    def holds(self, state: Mapping[str, Any]) -> bool:
        """Whether a state has been made."""
        return "step" in state

    def expected_bytes(self) -> int:
        """Predict the bytes of state that this process will hold."""
        return schema_bytes(self.schema())

    def own_names(self, held: Mapping[str, Any]) -> set[str]:
        """Name what a state holds of ours; the rest is others', who may keep what they like beside it."""
        return held.keys() & (NAMES | {PENDING})

    def check_state(self, held: Mapping[str, Any], source: str) -> None:
        """Raise ValueError unless a state is what a step would have made, apart from what others add."""
        found = {key: described(held[key]) for key in sorted(NAMES & held.keys())}
        expected = {key: (shape, dtype) for key, (shape, dtype) in sorted(self.whole_schema().items())}
        if found and found != expected:
            raise ValueError(
                f"the state of {self.name} should hold {expected} for a parameter of shape {tuple(self.param.shape)}, "
                f"{source} holds {found}"
            )
        if found and not 0 <= (step := gathered(held["step"]).item()) < math.inf:
            raise ValueError(f"the state of {self.name} should count its updates, {source} holds step={step}")

    def whole_schema(self) -> Schema:
        """Name every tensor of the state as a checkpoint holds it."""
        return state_schema(self.param.shape, self.group)

    def load(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return copies of a saved state, in the dtypes saved, where this process will hold them."""
        return {
            name: gathered(value).detach().to(device=self._device(name), copy=True) for name, value in saved.items()
        }

    def _device(self, name: str) -> torch.device | str:
        return "cpu" if name == "step" else self.param.device

    def views(self, gradient: Tensor, held: Callable[[], dict[str, Any]], lend: Lend) -> list[View]:
        """View what is to be updated by a gradient, given who makes or gives the state."""
        tools = lend(self.number, self.param, self.group)
        return [view_of(self.param, self.param, gradient, held, self.group, tools)]


def gathered(tensor: Tensor) -> Tensor:
    """Gather a DTensor, as of a checkpoint; return any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def described(value: Any) -> Any:
    """Describe what a checkpoint holds in the place of a state tensor: shape and dtype, or what is wrong with it."""
    if not isinstance(value, Tensor):
        return shown(value)
    if value.is_meta or value.layout is not torch.strided:
        return f"a tensor on the {value.device} device in layout {value.layout}"
    return tuple(value.shape), value.dtype


Asked = Mapping[View, list[Tensor]]  # what updates ask to have summed over the ranks
Sum = Callable[[Asked], Sequence[list[Tensor]]]
Found = dict[View, Recovered | None]


def side_by_side(updates: Mapping[View, Update], rounds: Callable[[int, Asked], Sum | None]) -> Found:
    """Run updates side by side: what they ask to have summed over the ranks goes in one message each round.

    Args:
        updates: of the views on this rank, in the same order on every rank.
        rounds: gives what sums in a round, from its number, counted from 0, and what is asked here; None: the updates
            have ended.

    Returns:
        What each update returns.
    """
    found: Found = {}
    sent: dict[View, Any] = dict.fromkeys(updates)  # None begins an update
    number = 0
    while True:
        asked = {view: sums for view in sent if (sums := _go_on(view, updates[view], sent[view], found)) is not None}
        add = rounds(number, asked)
        if add is None:
            return found
        sent, number = dict(zip(asked, add(asked), strict=True)), number + 1


def _go_on(view: View, one: Update, sums: Any, found: Found) -> list[Tensor] | None:
    """Send an update its sums; return what it asks for next, or None where it has ended."""
    try:
        return one.send(sums)
    except StopIteration as ended:
        found[view] = ended.value
        return None

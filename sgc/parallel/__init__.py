"""Views of the parts of tensors that a rank holds, and what ranks agree on and sum.

A harness puts something else in the place of whole tensors. It is one file, with a class `Harness`, and one line here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from sgc.parallel import fsdp2, zero
from sgc.parallel.home import Given, Home
from sgc.step import Recovered, Update
from sgc.views import View


class Harness(Protocol):
    """Who holds parts of tensors: finds them, and sums over the ranks what their updates need."""

    def home(self, number: int, param: Tensor, group: dict[str, Any], name: str) -> Home | None:
        """Return the home of a tensor that it holds parts of, or None for another tensor."""

    def measure(self, work: Sequence[tuple[Home, list[View]]]) -> None:
        """Sum over the ranks what views know of the gradient before anything moves."""

    def run(self, work: Sequence[tuple[Home, Mapping[View, Update]]]) -> dict[View, Recovered | None]:
        """Run updates, and sum over the ranks what they yield; return what each returns."""

    def held_tensors(self) -> list[Tensor]:
        """List the tensors that it has put in the place of others, as far as they have been seen."""


def harnesses(given: Given) -> tuple[Harness, ...]:
    """Return every harness there is, for an optimizer that was made with the given tensors."""
    return (fsdp2.Harness(), zero.Harness(given))

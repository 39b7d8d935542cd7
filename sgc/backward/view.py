"""The view of a tensor whose gradient is compressed: what is held of the gradient stands for it in an update."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sgc.apply import apply_sampled
from sgc.backward.gradient import CompressedGradient
from sgc.backward.sums import rewhitening
from sgc.codec.encode import Whitening
from sgc.moments import Rates
from sgc.views import Summed, Tools, View


class HeldView(View):
    """A whole tensor with a compressed gradient."""

    gradient: CompressedGradient

    def __init__(
        self,
        weight: Tensor,
        gradient: CompressedGradient,
        held: Callable[[], dict[str, Any]],
        group: Mapping[str, Any],
        tools: Tools,
    ) -> None:
        super().__init__(weight, weight, gradient, held, tuple(weight.shape), group, tools)

    def norm(self) -> Tensor:
        """Return ‖g‖, or −1 where no rank had a gradient."""
        return self.gradient.step_norm()

    @functools.cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        """What the sums of a sketch, and of squares, are multiplied by."""
        return self.gradient.use()

    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the means of g² over the rows and columns, as far as the sums over micro-batches tell."""
        sums, (factor, square) = self.gradient.sums(), self._factors
        row, col = sums.row * square, sums.col * square
        if self.projection is not None:
            beta2 = self.group["betas"][1]
            again = rewhitening(self.state["col"], beta2, sums.col / sums.number, col)
            self._factors = factor * again, square
        return row, col, None

    def encode(self, whitening: Whitening | None, squares: bool) -> Summed:
        """Return what has been sketched in backward."""
        yield from ()  # ranks have summed it
        sums, (factor, square) = self.gradient.sums(), self._factors
        return sums.p * factor, None if sums.q is None else sums.q * square

    def move_whitened(self, whitening: Whitening, rates: Rates) -> None:
        """Move the entries that are held, √m times as far as if all were; the others decay."""
        gradient, every = self.gradient, self.gradient.slot.sample_every
        value, turn = gradient.sums().p * self._factors[0], (gradient.first, every)
        lr, rounding = rates.lr * every**0.5, self.tools.rounding
        assert self.layout is not None
        apply_sampled(self.weight, value, turn, self.layout, whitening, lr, rates.decay, rounding)
        self.put_back()

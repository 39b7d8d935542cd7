"""Views of the tensors to be updated: what `sgc.step.update` asks of each, whoever holds which part of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from sgc.apply import apply_entries, apply_sparse, apply_whitened, move
from sgc.codec.encode import Whitening, encode, select
from sgc.codec.layout import Layout, Window, matrix_shape
from sgc.codec.lowrank import leading_basis, turn
from sgc.codec.project import Projection, mix
from sgc.moments import RULES, Rates
from sgc.state import has_basis, read_held, tensor_layout, write_held
from sgc.whiten import gradient_norm, means, square_sums

Summed = Generator[list[Tensor], list[Tensor], tuple[Tensor, Tensor | None]]


class Tools:
    """What the optimizer lends to the update of a tensor.

    Args:
        projection: A; None: there is no sketch.
        seed: of the random numbers of this update, 32 bits.
        device: of what is rounded at random; None: nothing is.
        stochastic: whether weights are rounded so.
        streams: of the moments and of the weights; parts of one tensor draw numbers of their own.
    """

    def __init__(
        self,
        projection: Projection | None,
        seed: int,
        device: torch.device | None,
        stochastic: bool,
        streams: tuple[int, int] = (0, 0),
    ) -> None:
        self.projection, self.seed = projection, seed
        self._device, self._stochastic, self._streams = device, stochastic, streams
        self._generators: dict[int, torch.Generator] = {}

    def _seeded(self, stream: int) -> torch.Generator | None:
        """Return the generator of a stream, one and the same at every call."""
        if self._device is None:
            return None
        if stream not in self._generators:
            seed = mix(self.seed ^ mix(stream)) if stream else self.seed
            self._generators[stream] = torch.Generator(self._device).manual_seed(seed)
        return self._generators[stream]

    @property
    def generator(self) -> torch.Generator | None:
        """For moments in bf16."""
        return self._seeded(self._streams[0])

    @property
    def rounding(self) -> torch.Generator | None:
        """For weights in bf16; None: they are rounded to nearest."""
        return self._seeded(self._streams[1]) if self._stochastic else None


class View:
    """A whole tensor on its way through one update; a subclass is a part of one, or has its gradient otherwise.

    Args:
        key: what is updated, for who keeps something by it.
        weight: of which `update` moves the entries; it may be strided.
        gradient: of the same entries.
        held: gives the state of the tensor or this part, which is changed in place; asked when it is needed, since a
            gradient that is not finite makes none.
        shape: of the whole tensor.
        group: the hyperparameters.
        tools: the optimizer's.
    """

    def __init__(
        self,
        key: Any,
        weight: Tensor,
        gradient: Tensor,
        held: Callable[[], dict[str, Any]],
        shape: tuple[int, ...],
        group: Mapping[str, Any],
        tools: Tools,
    ) -> None:
        self.key, self.group, self.gradient, self._held = key, group, gradient, held
        self.shape, self.tools, self.projection = shape, tools, tools.projection
        self.given, self.weight = weight, weight if weight.is_contiguous() else weight.contiguous()
        self.layout = tensor_layout(shape, group)  # of the whole tensor; None: it is not compressed
        self.window: Window | None = None  # what the part touches; None: it is the whole tensor
        self.rule = RULES[group["moments"]]
        self.whitens = self.layout is not None and self.rule.whitens
        self._state: dict[str, Any] | None = None
        self._sums: tuple[Tensor, Tensor] | None = None

    @property
    def state(self) -> dict[str, Any]:
        """The state of the tensor or this part."""
        if self._state is None:
            self._state = self._held()
        return self._state

    # -- what is known of the gradient before anything moves

    def norm(self) -> Tensor:
        """Compute ‖g‖ of the whole tensor, () fp32; where g² is to be summed over rows, in the same read."""
        if not self.whitens:
            return gradient_norm(self.gradient)
        assert self.layout is not None
        self._sums = square_sums(self.layout.grid(self.gradient), self.layout)
        return self._sums[0].sum().sqrt()

    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the means of g² over the rows and columns that R and C are held of; and what `whiten` calls mean."""
        assert self.layout is not None
        if self._sums is None:
            self.norm()
        assert self._sums is not None
        return *means(*self._sums, self.layout), None

    # -- compression

    @property
    def seen(self) -> Layout:
        """The layout of the rows in sight."""
        assert self.layout is not None
        return self.layout if self.window is None else self.window.layout

    @property
    def chunks(self) -> Layout:
        """The layout of the chunks whose sketches are held."""
        return self.seen

    def grid(self) -> Tensor:
        """View the gradient as the rows in sight, (rows, cols)."""
        return self.seen.grid(self.gradient) if self.window is None else self.window.grid(self.gradient)

    def in_sight(self, whitening: Whitening) -> Whitening:
        """Return what whitens the rows in sight, given what whitens the rows that R is held of."""
        return whitening

    def select(self, whitening: Whitening | None, sparsity: int) -> tuple[Tensor, Tensor]:
        """Select the top entries of every chunk in sight: index and value (c, s)."""
        return select(self.grid(), self.seen, whitening, sparsity)

    def encode(self, whitening: Whitening | None, squares: bool) -> Summed:
        """Sparsify and project: p, and with `squares` q, of the chunks whose sketches are held, (c, k) each."""
        assert self.projection is not None
        yield from ()  # nothing is to be summed over ranks
        return encode(self.grid(), self.seen, self.projection, self.group["sparsity"], whitening, squares=squares)

    def total(self, v: Tensor, index: Tensor) -> Generator[list[Tensor], list[Tensor], tuple[Tensor, Tensor]]:
        """Sum v (c, s'), 0 on padding, over the tensor, and count the real entries among index (c, s')."""
        yield from ()
        lengths = self.chunks.lengths(index.device)
        count = torch.tensor(v.numel(), device=v.device) if lengths is None else (index < lengths[:, None]).sum()
        return v.sum(), count

    # -- applying

    def move(self, update: Tensor | None, rates: Rates) -> None:
        """Move the entries by an update of all of them, or by none."""
        move(self.weight, update, rates.lr, rates.decay, self.tools.rounding)
        self.put_back()

    def move_whitened(self, whitening: Whitening, rates: Rates) -> None:
        """Move every entry by the whitened gradient."""
        offset = 0 if self.window is None else self.window.offset
        grid, layout = self.grid(), self.seen
        apply_whitened(self.weight, grid, layout, whitening, rates.lr, rates.decay, self.tools.rounding, offset)
        self.put_back()

    def apply(self, index: Tensor, value: Tensor, rates: Rates) -> None:
        """Move the entries that an update names, index and value (c, s')."""
        apply_sparse(self.weight, self.chunks, index, value, rates.lr, rates.decay, self.tools.rounding)
        self.put_back()

    def apply_own(self, index: Tensor, value: Tensor, layout: Layout, offset: int, rates: Rates) -> None:
        """Move those entries that an update of the chunks of a layout names here, where `offset` others precede."""
        position, value = layout.entries(index, value)
        position = position - offset
        own = (position >= 0) & (position < self.weight.numel())
        apply_entries(self.weight, position[own], value[own], rates.lr, rates.decay, self.tools.rounding)
        self.put_back()

    def put_back(self) -> None:
        """Write the moved weights where they came from, if they were not contiguous."""
        if self.weight is not self.given:
            self.given.copy_(self.weight)


class LowRank(View):
    """A matrix under double compression (CESGC): the codec works on PᵀG, and the recovered update is P·U."""

    @functools.cached_property
    def _small(self) -> Tensor:
        """PᵀG (r, m'), P made anew where it is due."""
        assert self.layout is not None
        matrix, state, t = self._matrix(self.gradient).float(), self.state, int(self.state["step"])
        if (t - 1) % self.group["refresh_every"] == 0:
            basis = leading_basis(matrix, self.layout.shape[0], seed=self.group["seed"] + t)
            if t > 1:
                self._turn(basis)
            state["basis"].copy_(basis)
        return state["basis"].T @ matrix

    def _matrix(self, x: Tensor) -> Tensor:
        """View the tensor as a matrix of no more rows than columns."""
        matrix = x.reshape(matrix_shape(tuple(x.shape)))
        return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T

    def grid(self) -> Tensor:
        """View PᵀG as the grid."""
        return self.seen.grid(self._small)

    def _turn(self, basis: Tensor) -> None:
        """Express what is held for the rows of PᵀG in a new basis."""
        state, old, rule = self.state, self.state["basis"], self.rule
        for name in rule.held if self.group["sketch_size"] else ():
            squared = name != rule.held[0]
            write_held(state, name, turn(read_held(state, name), old, basis, squared=squared), self.tools.generator)
        if rule.whitens:
            state["row"].copy_(turn(state["row"], old, basis, squared=True))

    def norm(self) -> Tensor:
        """Compute ‖G‖."""
        return gradient_norm(self.gradient)

    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the means of the squares of PᵀG over its rows and columns."""
        assert self.layout is not None
        return *means(*square_sums(self.grid(), self.layout), self.layout), None

    def move_whitened(self, whitening: Whitening, rates: Rates) -> None:
        """Move every entry by P times the whitened PᵀG."""
        self._move_by(whitening.divide(self.grid()).clamp_(-whitening.clip, whitening.clip), rates)

    def apply(self, index: Tensor, value: Tensor, rates: Rates) -> None:
        """Move every entry by P·U."""
        self._move_by(self.chunks.scatter(index, value), rates)

    def _move_by(self, small: Tensor, rates: Rates) -> None:
        assert self.layout is not None
        wide = self.state["basis"] @ small.view(self.layout.shape)
        update = torch.empty_like(self.gradient, dtype=torch.float32, memory_format=torch.contiguous_format)
        self._matrix(update).copy_(wide)
        self.move(update, rates)


def view_of(
    key: Any,
    weight: Tensor,
    gradient: Tensor,
    held: Callable[[], dict[str, Any]],
    group: Mapping[str, Any],
    tools: Tools,
) -> View:
    """View a tensor that this process holds whole, with its whole gradient."""
    shape = tuple(weight.shape)
    doubly = tensor_layout(shape, group) is not None and has_basis(shape, group)
    return (LowRank if doubly else View)(key, weight, gradient, held, shape, group, tools)

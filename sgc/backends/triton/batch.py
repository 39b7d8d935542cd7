"""One update of many tensors in a handful of launches, without waiting for the device.

The host does not learn whether a gradient is finite before it goes on: kernels decide that on the device, and a
`Pending` brings ‖g‖ of every tensor back when it can be had for nothing. Until then `state["step"]` counts the update
as made. Each tensor has a slot on the device that counts its calls that were no updates; the table says of how many
the host had learnt when it wrote `state["step"]`, so the device knows t whether the host is behind or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from sgc.backends.triton import adamw, encode, recover, scatter, whitened
from sgc.backends.triton.adamw import BLOCK
from sgc.backends.triton.chunks import on_device_of
from sgc.backends.triton.table import (
    DTYPES,
    FOUR_WARPS,
    ONE_WARP,
    RATES,
    SUMS_AT,
    WORDS,
    log_or_less,
)
from sgc.backends.triton.whitened import FOLDED, MOVED, SUMMED, aligned, passes, tile_height, tile_width

if TYPE_CHECKING:
    from sgc.codec.layout import Layout
    from sgc.codec.project import Projection

WAVE_ENTRIES = 1 << 30  # of the tensors launched together: their scratch takes 4 bytes for every 85 of them, 50 MB
MOST_TABLES = 8  # sets of tensors, as experts or adapters make, whose tables are kept


class Sparse(NamedTuple):
    """How the update of a tensor is made sparse."""

    sparsity: int  # s, of the gradient; without A it is s'
    recovered: int  # s'
    projection: Projection | None  # A, and E ← ρE + p; None: what is selected is the update
    probed: int  # chunks, the first ones, of which `noted` wants to know
    noted: Callable[[Tensor, Tensor, Tensor | None], None] | None  # is told their index, value (c, s'), E before (c, k)


class TensorUpdate(NamedTuple):
    """One tensor's update, of weights and gradient in which `obstacle` sees none."""

    weight: Tensor  # contiguous
    gradient: Tensor
    state: Mapping[str, Tensor]  # "step", and "row" and "col" or "exp_avg" and "exp_avg_sq"
    layout: Layout | None  # its grid; None: kept dense, under AdamW
    lr: float  # times scale, negative to maximize
    decay: float  # lr times weight decay
    eps: float
    betas: tuple[float, float]
    seed: int  # 32 bits, of stochastic rounding at this step
    stochastic: bool  # whether bf16 weights are rounded so
    sparse: Sparse | None = None  # None: every one moves

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """R and C, or both moments of AdamW."""
        first, second = ("row", "col") if self.layout is not None else ("exp_avg", "exp_avg_sq")
        return self.state[first], self.state[second]


class Kind(NamedTuple):
    """What tensors of one launch have in common."""

    factored: bool
    sparse: bool
    gradients: torch.dtype
    weights: torch.dtype
    aligned: bool
    stochastic: bool
    across: int  # BN; 0 for tensors kept dense

    def constants(self) -> dict[str, Any]:
        """Return what kernels are compiled for."""
        return {"DTYPE": DTYPES[self.gradients], "ALIGNED": self.aligned}

    def weight_constants(self) -> dict[str, Any]:
        """Return what kernels that move weights are compiled for."""
        return {**self.constants(), "WEIGHTS": DTYPES[self.weights], "STOCHASTIC": self.stochastic, **FOUR_WARPS}


class Launch(NamedTuple):
    """Tensors of one kind that are launched together."""

    kind: Kind
    numbers: list[int]  # of the tensors
    down: int  # rows of a tile
    tiles: Tensor  # (programs,) int32, the tensor of each tile or block
    folds: Tensor  # (programs,) int32, the tensor of each program that folds; empty for tensors kept dense
    scratch: int  # fp32 numbers


class Tables(NamedTuple):
    """Tables for a set of tensors."""

    layouts: list[Layout | None]
    static: Tensor  # (WORDS − RATES, tensors) int64
    sums_at: list[int]  # by tensor: its SUMS_AT
    launches: list[Launch]
    slots: list[int]
    slots_there: Tensor  # (tensors,) int64, on the device
    missed_now: Tensor  # (tensors,) int32, on the device


class Pending:
    """The norms of one call, on their way to the host."""

    def __init__(
        self, norms: Tensor, weights: list[Tensor], steps: list[Tensor], slots: list[int], settled: list[int]
    ) -> None:
        self.weights = weights
        self._steps, self._slots, self._settled = steps, slots, settled
        self._event = torch.cuda.Event() if norms.is_cuda else None
        self._norms = torch.empty(norms.shape, dtype=norms.dtype, pin_memory=norms.is_cuda)
        self._norms.copy_(norms, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def ready(self) -> bool:
        """Whether they can be read without waiting."""
        return self._event is None or self._event.query()

    def settle(self) -> list[float]:
        """Return the norms, and take back the counts of updates that were none; to be called once."""
        if self._event is not None:
            self._event.synchronize()
        norms: list[float] = self._norms.tolist()
        for norm, step, slot in zip(norms, self._steps, self._slots, strict=True):
            if not (norm > 0 and math.isfinite(norm)):
                step -= 1
                self._settled[slot] += 1
        return norms


class Batch:
    """The tables and launches for the tensors of one optimizer on one device.

    Args:
        device: of all of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[Any, Tables] = {}
        self._slots: dict[int, int] = {}  # address of a weight → slot
        self._settled: list[int] = []  # by slot: calls that were no updates, as far as the host has learnt
        self._missed = torch.zeros(0, dtype=torch.int32, device=device)  # by slot: all of them

    def update(self, updates: Sequence[TensorUpdate]) -> Pending:
        """Make one update of every tensor whose gradient is finite; decay those whose gradient is all zero.

        Weights and R, C or the moments are changed, and `state["step"]` counts an update until the result is settled.

        Returns:
            Their norms, when they arrive.
        """
        with on_device_of(self._missed):
            return self._update(updates)

    def _update(self, updates: Sequence[TensorUpdate]) -> Pending:
        whole = (e if e.gradient.is_contiguous() else e._replace(gradient=e.gradient.contiguous()) for e in updates)
        updates = list(whole)
        tables = self._tables(updates)
        table = self._table(updates, tables)
        norms = torch.empty(len(updates), dtype=torch.float32, device=self._device)
        missed = (self._missed, norms, tables.missed_now, len(updates))
        for launch in tables.launches:
            parts = self._run(launch, table, missed)
            for number in launch.numbers if launch.kind.sparse else ():
                move_sparsely(updates[number], parts[tables.sums_at[number] :], norms[number])
        self._missed.index_copy_(0, tables.slots_there, tables.missed_now)
        weights = [e.weight for e in updates]
        torch.autograd.graph.increment_version(weights)
        steps = [e.state["step"] for e in updates]
        torch._foreach_add_(steps, 1)
        return Pending(norms, weights, steps, tables.slots, self._settled)

    def _run(self, launch: Launch, table: Tensor, missed: tuple[Tensor, Tensor, Tensor, int]) -> Tensor:
        """Launch all that many tensors share, and give the scratch, where a and b of each now lie."""
        kind, count, norms = launch.kind, missed[-1], missed[1]
        tiles, folds = (len(launch.tiles),), (len(launch.folds),)
        totals = torch.empty(2 * max(*tiles, *folds), dtype=torch.float32, device=self._device)
        if not kind.factored:
            adamw.adamw_sums[tiles](table, launch.tiles, totals, count, **kind.constants(), **FOUR_WARPS)
            adamw.adamw_step[tiles](table, launch.tiles, totals, *missed, **kind.weight_constants())
            return totals
        across, down = kind.across, launch.down
        parts = torch.empty(launch.scratch, dtype=torch.float32, device=self._device)
        sizes = passes(across, down, SUMMED)
        whitened.tile_sums[tiles](table, launch.tiles, parts, count, **kind.constants(), **sizes, **ONE_WARP)
        whitened.fold_sums[folds](table, launch.folds, parts, totals, count, across, down, **FOUR_WARPS)
        whitened.move_moments[folds](table, launch.folds, parts, totals, *missed, **FOUR_WARPS)
        sizes = passes(across, down, MOVED)
        if not kind.sparse:
            whitened.whiten_and_apply[tiles](
                table, launch.tiles, parts, norms, count, **kind.weight_constants(), **sizes
            )
        return parts

    def _table(self, updates: Sequence[TensorUpdate], tables: Tables) -> Tensor:
        """Write what changes with every step beside what does not, and send it."""
        bases = torch.stack([e.state["step"] for e in updates]).tolist()
        settled = self._settled
        words = [
            [e.gradient.data_ptr() for e in updates],
            [int(base) + settled[slot] for base, slot in zip(bases, tables.slots, strict=True)],
            [e.seed for e in updates],
        ]
        rates = [
            [e.lr for e in updates],
            [1 - e.decay for e in updates],
            [e.eps for e in updates],
            [e.betas[0] for e in updates],
            [e.betas[1] for e in updates],
            [log_or_less(e.betas[0]) for e in updates],
            [log_or_less(e.betas[1]) for e in updates],
        ]
        changing = [torch.tensor(words), torch.tensor(rates, dtype=torch.float64).view(torch.int64)]
        return self._send(torch.cat([*changing, tables.static]))

    def _tables(self, updates: Sequence[TensorUpdate]) -> Tables:
        key = tuple(map(signature_of, updates))
        if key not in self._known:
            if len(self._known) == MOST_TABLES:
                self._known.pop(next(iter(self._known)))
            self._known[key] = self._make_tables(updates)
        return self._known[key]

    def _make_tables(self, updates: Sequence[TensorUpdate]) -> Tables:
        slots = [self._slots.setdefault(e.weight.data_ptr(), len(self._slots)) for e in updates]
        new = len(self._slots) - len(self._settled)
        self._settled += [0] * new
        self._missed = torch.cat([self._missed, self._missed.new_zeros(new)])
        columns: list[list[int]] = [[0] * (WORDS - RATES)] * len(updates)
        launches = []
        for kind, numbers in waves(updates):
            tiles, folds, scratch, owners, folders = 0, 0, 0, [], []
            wave = sum(updates[number].weight.numel() for number in numbers)
            high = tile_height(kind.across, wave) if kind.factored else 0
            for number in numbers:
                one = updates[number]
                first, second = (moment.data_ptr() for moment in one.moments)
                held = [one.weight.data_ptr(), first, second]
                layout = one.layout
                if layout is None:
                    numel = one.weight.numel()
                    columns[number] = [*held, 1, numel, numel, slots[number], tiles, 0, 0, 0, 0]
                    own, folding = triton.cdiv(numel, BLOCK.value), 0
                else:
                    down, across = triton.cdiv(layout.rows, high), triton.cdiv(layout.cols, kind.across)
                    col_at = scratch + across * layout.rows
                    sums_at = triton.cdiv(col_at + down * layout.cols, 4) * 4  # where 16 bytes begin
                    size = [layout.rows, layout.cols, layout.numel]
                    columns[number] = [*held, *size, slots[number], tiles, folds, scratch, col_at, sums_at]
                    scratch = sums_at + layout.rows + layout.cols
                    own = down * across
                    folding = triton.cdiv(layout.rows, FOLDED.value) + triton.cdiv(layout.cols, FOLDED.value)
                tiles, folds = tiles + own, folds + folding
                owners.append(own)
                folders.append(folding)
            owned = self._owners(numbers, owners), self._owners(numbers, folders)
            launches.append(Launch(kind, numbers, high, *owned, scratch))
        static = torch.tensor(columns, dtype=torch.int64).T.contiguous()
        none = torch.zeros(len(slots), dtype=torch.int32, device=self._device)
        sums_at = [column[SUMS_AT.value - RATES] for column in columns]
        layouts = [e.layout for e in updates]
        return Tables(layouts, static, sums_at, launches, slots, self._send(torch.tensor(slots)), none)

    def _send(self, here: Tensor) -> Tensor:
        """Copy to the device without waiting; pinned memory is not given to others before it has been read."""
        return here if self._device.type == "cpu" else here.pin_memory().to(self._device, non_blocking=True)

    def _owners(self, numbers: Sequence[int], programs: Sequence[int]) -> Tensor:
        tensors = torch.tensor(numbers, dtype=torch.int32)
        return self._send(tensors.repeat_interleave(torch.tensor(programs)))


def move_sparsely(one: TensorUpdate, factors: Tensor, norm: Tensor) -> None:
    """Encode, recover and apply one tensor's update, in a launch each.

    Args:
        one: with `sparse`.
        factors: a (rows,), then b (cols,), and what follows is not read.
        norm: of its gradient, () fp32.
    """
    weight, gradient, layout, sparse = one.weight, one.gradient, one.layout, one.sparse
    assert layout is not None
    assert sparse is not None
    whitening = factors[: layout.rows], factors[layout.rows : layout.rows + layout.cols], None
    before, projection = None, sparse.projection
    if projection is None:
        index, value = encode.select(gradient, layout, whitening, sparse.sparsity, one.eps, norm=norm)
    else:
        sketch = one.state["sketch"].view(layout.chunks, projection.sketch_size)
        into = encode.Into(sketch, one.betas[0], averages=False)
        encode.encode(gradient, layout, whitening, projection, sparse.sparsity, one.eps, into=into, norm=norm)
        before = None if sparse.noted is None else sketch[: sparse.probed].clone()
        index, value = recover.recover(sketch, layout, projection, sparse.recovered, take=True, norm=norm)
    seed = one.seed if one.stochastic and weight.dtype is torch.bfloat16 else None
    scatter.apply(weight, layout, index, value, one.lr, one.decay, seed, norm=norm)
    if sparse.noted is not None:
        sparse.noted(index[: sparse.probed], value[: sparse.probed], before)


def obstacle(weight: Tensor, gradient: Tensor) -> str | None:
    """Return why the kernels can't make an update, or None."""
    for tensor in (weight, gradient):
        if tensor.dtype not in DTYPES:
            return f"its dtype is {tensor.dtype}"
    if not weight.is_contiguous():
        return "its weights are not contiguous"
    if gradient.device != weight.device:
        return f"its gradient is on {gradient.device}, and its weights are on {weight.device}"
    return None


def sparse_obstacle(weight: Tensor, layout: Layout, dtype: torch.dtype, sparse: Sparse, recovery: str) -> str | None:
    """Return why the kernels can't make a sparse update of a tensor, given the dtype of its gradient, or None."""
    found = encode.obstacle(layout, dtype, sparse.sparsity, sparse.projection)
    if found is None and sparse.projection is not None:
        found = recover.obstacle(layout, sparse.projection, sparse.recovered, recovery)
    return scatter.obstacle(weight, layout) if found is None else found


def signature_of(one: TensorUpdate) -> tuple[Any, ...]:
    """Return what tables depend on, of one tensor; they hold its layout, so that no other has its id."""
    weight, gradient = one.weight, one.gradient
    first, second = one.moments
    addresses = (weight.data_ptr(), first.data_ptr(), second.data_ptr(), gradient.data_ptr() % 16)
    dtypes = gradient.dtype, weight.dtype
    return *addresses, id(one.layout), weight.numel(), *dtypes, one.stochastic, one.sparse is None


def kind_of(one: TensorUpdate) -> Kind:
    """Return the kind of tensors that one can be launched with."""
    weight, gradient, layout = one.weight, one.gradient, one.layout
    addresses = [weight.data_ptr(), gradient.data_ptr()]
    stochastic = one.stochastic and weight.dtype is torch.bfloat16
    if layout is None:
        addresses += [moment.data_ptr() for moment in one.moments]
        fits = weight.numel() % 8 == 0 and all(address % 16 == 0 for address in addresses)
        return Kind(False, False, gradient.dtype, weight.dtype, fits, stochastic, 0)
    across = tile_width(layout.cols, gradient.element_size())
    sparse = one.sparse is not None
    return Kind(True, sparse, gradient.dtype, weight.dtype, aligned(layout, *addresses), stochastic, across)


def waves(updates: Sequence[TensorUpdate]) -> Iterator[tuple[Kind, list[int]]]:
    """Yield the numbers of the tensors to be launched together."""
    kinds: dict[Kind, list[int]] = {}
    for number, one in enumerate(updates):
        kinds.setdefault(kind_of(one), []).append(number)
    for kind, numbers in kinds.items():
        wave: list[int] = []
        held = 0
        for number in numbers:
            entries = updates[number].weight.numel()
            if wave and held + entries > WAVE_ENTRIES:
                yield kind, wave
                wave, held = [], 0
            wave.append(number)
            held += entries
        yield kind, wave

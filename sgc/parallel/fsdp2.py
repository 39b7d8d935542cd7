"""FSDP2: the update of tensors of which every rank holds some rows, and their state. (ours)

A tensor keeps the layout of its whole shape, so its state is the same for any number of ranks. Where the boundaries of
the shards leave every chunk whole, a rank works on its rows alone: it holds their R and their sketches, and C is summed
over the ranks. Where a boundary cuts a chunk, each rank encodes its own entries at their places, the partial sketches
are summed, and every rank holds all of the (small) state, recovers all of the update and applies its part of it. A step
makes two all-reduces for all tensors together: one of the statistics and norms, one of the partial sketches, if any;
and for a rule whose values depend on a mean over the tensor ("sketched") a third, of two numbers for each tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from sgc.codec.encode import Whitening, encode
from sgc.codec.layout import Layout
from sgc.moments import Rates
from sgc.parallel.home import Asked, Home, Lend, side_by_side
from sgc.state import Schema, is_cut, is_doubly_compressed, new_state, state_schema, tensor_layout
from sgc.step import Recovered, Update
from sgc.views import Summed, Tools, View
from sgc.whiten import means, square_sums

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, as FSDP2 makes of every parameter."""
    if type(tensor) in (Tensor, torch.nn.Parameter) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor  # slow to import, and only here when something made one

    return isinstance(tensor, DTensor)


def is_flattened(param: Tensor) -> bool:
    """Whether FSDP1 has flattened a parameter, and so hides its shape and this rank's part of it."""
    return getattr(param, "_fsdp_flattened", False)


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@dataclass(frozen=True)
class Shard:
    """Where the local part of a sharded tensor lies: indices start to stop of dim 0."""

    mesh: Any  # DeviceMesh
    mesh_dim: int | None  # along which dim 0 is sharded; None: every rank holds all of the tensor
    start: int
    stop: int

    @property
    def process_group(self) -> Any:
        """The ranks that hold the other parts, or None."""
        return None if self.mesh_dim is None else self.mesh.get_group(self.mesh_dim)

    def placements(self, split: bool) -> list[Any]:
        """Return the placements of a state tensor that is split as the parameter is, or held by every rank."""
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor import Shard as Split

        return [Split(0) if split and at == self.mesh_dim else Replicate() for at in range(self.mesh.ndim)]


def shard_of(param: DTensor, group: Mapping[str, Any], name: str) -> Shard:
    """Find the part of a parameter that this rank holds.

    Raises:
        TypeError: it is sharded along another dimension than 0, or along several.
        ValueError: it is to be compressed doubly (`rank`).
    """
    from torch.distributed.tensor import Shard as Split

    placements, mesh = param.placements, param.device_mesh
    split = [at for at, placement in enumerate(placements) if not placement.is_replicate()]
    plain = all(type(placements[at]) is Split and placements[at] == Split(0) for at in split)
    if len(split) > 1 or not plain:
        raise TypeError(
            "SGC trains tensors that are sharded along dimension 0 over one dimension of the mesh, as by FSDP2, "
            f"{name} has placements {tuple(placements)}"
        )
    if is_doubly_compressed(param.shape, group):
        raise ValueError(f"rank must be None where tensors are sharded, got {group['rank']} for {name}")
    if not split:
        return Shard(mesh, None, 0, param.shape[0] if param.dim() else 1)
    size, ranks, rank = param.shape[0], mesh.size(split[0]), mesh.get_local_rank(split[0])
    most = math.ceil(size / ranks)
    start = min(rank * most, size)
    return Shard(mesh, split[0], start, min(start + most, size))


def is_split(name: str, shape: Sequence[int], group: Mapping[str, Any]) -> bool:
    """Whether a tensor of the state is sharded as the parameter, of this shape, is."""
    layout = tensor_layout(shape, group)
    if layout is None:
        return name != "step"
    return name not in ("step", "col") and not is_cut(layout, group)


def local_schema(shape: Sequence[int], group: Mapping[str, Any], indices: int) -> Schema:
    """Name every tensor of the state that a rank holds, given how many indices of dim 0 it has."""
    whole = state_schema(shape, group)
    return {
        name: ((indices, *size[1:]) if is_split(name, shape, group) else size, dtype)
        for name, (size, dtype) in whole.items()
    }


class ShardedHome(Home):
    """A parameter of which this rank holds a shard; all of its state but the count of steps is DTensors."""

    param: DTensor

    @functools.cached_property
    def shard(self) -> Shard:
        """The part that this rank holds."""
        return shard_of(self.param, self.group, self.name)

    def schema(self) -> Schema:
        """Name every tensor of the state that this rank holds, with its local shape and its dtype."""
        return local_schema(self.param.shape, self.group, self.shard.stop - self.shard.start)

    def new_state(self) -> dict[str, Any]:
        """Make the state, all zero."""
        own, whole = new_state(self.schema(), self.param.device), self.whole_schema()
        return {name: self._placed(name, value, whole[name][0]) for name, value in own.items()}

    def load(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Place copies of a saved state, whole tensors or DTensors of the right shapes, as `new_state` would."""
        state = dict(saved)
        for name, (shape, _) in state_schema(self.param.shape, self.group).items():
            value, split = saved[name].detach(), is_split(name, self.param.shape, self.group)
            if is_sharded(value):
                if value.device_mesh == self.shard.mesh and list(value.placements) == self.shard.placements(split):
                    own = value.to_local()
                    state[name] = self._placed(name, own.to(self.param.device, copy=True), shape)
                    continue
                value = value.full_tensor()
            own = value[self.shard.start : self.shard.stop] if split else value
            state[name] = self._placed(name, own.to(self._device(name), copy=True).contiguous(), shape)
        return state

    def _placed(self, name: str, own: Tensor, shape: Sequence[int]) -> Tensor:
        if name == "step":
            return own
        from torch.distributed.tensor import DTensor

        stride = tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))
        placements = self.shard.placements(is_split(name, self.param.shape, self.group))
        size = torch.Size(shape)
        return DTensor.from_local(own, self.shard.mesh, placements, run_check=False, shape=size, stride=stride)

    def views(self, gradient: Tensor, held: Callable[[], dict[str, Any]], lend: Lend) -> list[View]:
        """View this rank's part.

        Raises:
            TypeError: the gradient is placed differently.
        """
        param = self.param
        if not is_sharded(gradient) or gradient.placements != param.placements:
            placed = tuple(gradient.placements) if is_sharded(gradient) else "none"
            raise TypeError(
                f"the gradient of {self.name} must have its placements, {tuple(param.placements)}, got {placed}"
            )
        layout = tensor_layout(param.shape, self.group)
        cut = layout is not None and is_cut(layout, self.group)
        stream = self.shard.start + cut  # parts draw numbers of their own, and differ from a state that all hold
        tools = lend(self.number, param, self.group, (0 if cut else stream, stream))
        state = {name: local(value) for name, value in held().items()}
        return [ShardView(self.shard, cut, param, gradient.to_local(), state, self.group, tools)]


class ShardView(View):
    """This rank's rows of a sharded tensor on their way through one update."""

    def __init__(
        self,
        shard: Shard,
        cut: bool,
        param: DTensor,
        gradient: Tensor,
        state: dict[str, Any],
        group: Mapping[str, Any],
        tools: Tools,
    ) -> None:
        super().__init__(param, param.to_local(), gradient, lambda: state, tuple(param.shape), group, tools)
        self.shard, self.cut = shard, cut
        self._start = 0  # the first entry of the part in the tensor
        self._reduced: list[Tensor]
        if self.layout is not None:
            entries = self.layout.numel // param.shape[0]
            self._start, stop = shard.start * entries, shard.stop * entries
            aligned = cut or self.layout.rows_per_slice(self.layout.rows_per_chunk) is not None
            self.window = self.layout.window(self._start, stop, None if aligned else 1)

    def sums(self) -> list[Tensor]:
        """Return what is to be summed over the ranks: ‖g‖², and for R and C Σg² by row and column."""
        if not self.whitens:
            norm = torch.linalg.vector_norm(self.gradient.float(), dtype=torch.float32)
            return [norm.square().view(1)]
        assert self.layout is not None
        assert self.window is not None
        row, col = square_sums(self.grid(), self.window.layout)
        if self.cut:
            rows = row.new_zeros(self.layout.rows)
            rows[self.window.rows] = row
            return [row.sum().view(1), col, rows]
        beta2 = self.group["betas"][1]
        self._row = row
        moved = beta2 * self.state["row"].sum() + (1 - beta2) * row.sum() / self.layout.cols
        return [row.sum().view(1), col, moved.view(1)]

    def take(self, sums: list[Tensor]) -> None:
        """Take the sums of all ranks."""
        self._norm, self._reduced = sums[0].sqrt().squeeze(0), sums[1:]

    def norm(self) -> Tensor:
        """Return ‖g‖ of the whole tensor, known when the statistics are summed."""
        return self._norm

    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the means over this rank's rows, or all rows where a chunk is cut, and over the columns."""
        assert self.layout is not None
        col, last = self._reduced
        row, col = means(last if self.cut else self._row, col, self.layout)
        return row, col, None if self.cut else last.squeeze(0) / self.layout.rows

    def in_sight(self, whitening: Whitening) -> Whitening:
        """Return what whitens this rank's rows."""
        return whitening.of(self.window.rows) if self.cut and self.window is not None else whitening

    @property
    def chunks(self) -> Layout:
        """The layout of the chunks whose sketches are held: all of them where one is cut."""
        assert self.layout is not None
        return self.layout if self.cut and self.projection is not None else self.seen

    def encode(self, whitening: Whitening | None, squares: bool) -> Summed:
        """Sparsify and project; where a chunk is cut, ranks sum the sketches of all chunks."""
        if not self.cut:
            return (yield from super().encode(whitening, squares))
        assert self.layout is not None
        assert self.window is not None
        assert self.projection is not None
        sparsity, chunks = self.group["sparsity"], self.window.chunks
        found = encode(self.grid(), self.seen, self.projection, sparsity, whitening, squares=squares)
        padding = (0, 0, chunks.start, self.layout.chunks - chunks.stop)
        p, *q = yield [torch.nn.functional.pad(part, padding) for part in found if part is not None]
        return p, q[0] if q else None

    def total(self, v: Tensor, index: Tensor) -> Any:
        """Sum v over the tensor: over the ranks, unless every rank recovers all of it."""
        found = yield from super().total(v, index)
        if self.cut:
            return found
        [sums] = yield [torch.stack(found)]
        return sums.unbind()

    def apply(self, index: Tensor, value: Tensor, rates: Rates) -> None:
        """Move this rank's entries among those that an update names."""
        assert self.window is not None
        if not self.cut:
            super().apply(index, value, rates)
        elif self.projection is not None:
            self.apply_own(index, value, self.chunks, self._start, rates)
        else:  # each side of a boundary moves the top entries of its own part of a chunk
            self.apply_own(index, value, self.seen, self.window.offset, rates)


class Harness:
    """FSDP2: sums over the ranks in messages that serve all tensors."""

    def home(self, number: int, param: Tensor, group: dict[str, Any], name: str) -> Home | None:
        """Return the home of a sharded parameter, or None for one that is not sharded."""
        return ShardedHome(number, param, group, name) if is_sharded(param) else None

    def measure(self, work: Sequence[tuple[Home, list[View]]]) -> None:
        """Sum the norms and the statistics of R and C over the ranks, in one all-reduce for each process group."""
        views = [view for _, views in work for view in views if isinstance(view, ShardView)]
        found: Asked = {view: view.sums() for view in views}
        for view, sums in zip(views, summed(found), strict=True):
            view.take(sums)

    def run(self, work: Sequence[tuple[Home, Mapping[View, Update]]]) -> dict[View, Recovered | None]:
        """Run the updates of all shards side by side."""
        updates = {view: one for _, some in work for view, one in some.items()}
        return side_by_side(updates, lambda _, asked: summed if asked else None)

    def held_tensors(self) -> list[Tensor]:
        """Return none: the groups list the shards themselves."""
        return []


def summed(tensors: Asked) -> list[list[Tensor]]:
    """Sum the fp32 tensors of every shard over its ranks: one all-reduce for each process group."""
    result, members = list(tensors.values()), dict[Any, list[int]]()
    shards = [(number, view) for number, view in enumerate(tensors) if isinstance(view, ShardView)]
    devices: dict[Any, torch.device] = {}
    for number, view in shards:
        shard = view.shard
        if shard.mesh_dim is not None and shard.mesh.size(shard.mesh_dim) > 1:
            members.setdefault(shard.process_group, []).append(number)
            devices.setdefault(shard.process_group, _device_of(view))
    for process_group, numbers in members.items():
        flat = [tensor.reshape(-1) for number in numbers for tensor in result[number]]
        total = torch.cat([piece.to(devices[process_group]) for piece in flat])
        dist.all_reduce(total, group=process_group)
        pieces = iter(total.split([piece.numel() for piece in flat]))
        for number in numbers:
            result[number] = [next(pieces).view(one.shape).to(one.device) for one in result[number]]
    return result


def _device_of(view: ShardView) -> torch.device:
    """Return the device on which the mesh communicates: with CPU offload it is not the parameters'."""
    kind = view.shard.mesh.device_type
    return view.gradient.device if view.gradient.device.type == kind else torch.device(kind)

"""FSDP2: the update of tensors of which every rank holds some rows, and their state. (ours)

A tensor keeps the layout of its whole shape, so its state is the same for any number of ranks. Where the boundaries of
the shards leave every chunk whole, a rank works on its rows alone: it holds their R and their sketches, and C is summed
over the ranks. Where a boundary cuts a chunk, each rank encodes its own entries at their places, the partial sketches
are summed, and every rank holds all of the (small) state, recovers all of the update and applies its part of it. A step
makes two all-reduces for all tensors together: one of the statistics and norms, one of the partial sketches, if any.
(And for the rule "sketched", whose values depend on a mean over the tensor, one of two numbers for each tensor.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from sgc.codec.layout import Layout
from sgc.codec.project import Projection
from sgc.moments import FACTORED
from sgc.state import QUANTIZED_BLOCK, chunks_per_slice, is_doubly_compressed, state_schema, tensor_layout
from sgc.step import (
    Update,
    Whitening,
    apply_entries,
    apply_sparse,
    apply_whitened,
    encode,
    entries,
    means,
    select,
    sketched_update,
    square_sums,
    whiten_by,
    whitened_update,
)

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


@dataclasses.dataclass(frozen=True)
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
        """Give the placements of a state tensor that is split as the parameter is, or held by every rank."""
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


def is_cut(layout: Layout, group: Mapping[str, Any]) -> bool:
    """Whether a boundary between indices of dim 0 may cut what the state of a tensor is made of."""
    if group["recovered"] is None:  # no sketch, and every entry moves
        return layout.rows_per_slice() is None
    pieces = chunks_per_slice(layout)
    if pieces is None:
        return True
    quantized = group["sketch_size"] and group["state_dtype"] == "int8"
    return bool(quantized and pieces * min(group["sketch_size"], layout.chunk) % QUANTIZED_BLOCK)


def state_placements(param: DTensor, group: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype, bool]]:
    """Name every state tensor of a parameter with its whole shape, its dtype and whether it is sharded."""
    layout = tensor_layout(param.shape, group)
    everywhere = {"step"} if layout is None else {"step", "col"}
    cut = layout is not None and is_cut(layout, group)
    schema = state_schema(param.shape, group)
    return {name: (shape, dtype, not cut and name not in everywhere) for name, (shape, dtype) in schema.items()}


def local_bytes(param: DTensor, group: Mapping[str, Any], shard: Shard) -> int:
    """Predict the bytes of state that this rank will hold for a parameter."""
    total = 0
    for shape, dtype, split in state_placements(param, group).values():
        own = shard.stop - shard.start if split else math.prod(shape[:1])
        total += own * math.prod(shape[1:]) * dtype.itemsize
    return total


def make_state(param: DTensor, group: Mapping[str, Any], shard: Shard) -> dict[str, Tensor]:
    """Make the state of a parameter: DTensors on its mesh; `step` alone is a plain tensor on the CPU."""
    state: dict[str, Tensor] = {}
    for key, (shape, dtype, split) in state_placements(param, group).items():
        if key == "step":
            state[key] = torch.zeros(shape, dtype=dtype, device="cpu")
            continue
        own = (shard.stop - shard.start, *shape[1:]) if split else shape
        state[key] = _placed(torch.zeros(own, dtype=dtype, device=param.device), shape, shard, split)
    return state


def load_state(saved: Mapping[str, Any], param: DTensor, group: Mapping[str, Any], shard: Shard) -> dict[str, Any]:
    """Place a saved state of a parameter, whole tensors or DTensors of the right shapes, as `make_state` would.

    Returns:
        The state, of copies in the dtypes saved.
    """
    state = dict(saved)
    for key, (shape, _, split) in state_placements(param, group).items():
        if key == "step":
            state[key] = saved[key].detach().to("cpu", copy=True)
            continue
        value, placements = saved[key].detach(), shard.placements(split)
        if is_sharded(value):
            if value.device_mesh == shard.mesh and list(value.placements) == placements:
                local = value.to_local()
                state[key] = _placed(local.to(param.device, copy=True), shape, shard, split)
                continue
            value = value.full_tensor()
        local = value[shard.start : shard.stop] if split else value
        state[key] = _placed(local.to(param.device, copy=True).contiguous(), shape, shard, split)
    return state


def _placed(local: Tensor, shape: Sequence[int], shard: Shard, split: bool) -> DTensor:
    from torch.distributed.tensor import DTensor

    stride = tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))
    placements = shard.placements(split)
    return DTensor.from_local(local, shard.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def whole(tensor: Tensor) -> Tensor:
    """Gather a DTensor of a checkpoint; any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Give what this rank holds of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


class Part:
    """The rows of a sharded tensor that lie on this rank, during one step.

    Args:
        param: of which this rank holds a part.
        gradient: with the placements of the parameter.
        state: as `make_state` makes it.
        group: the hyperparameters.
        shard: which part.
        name: of the parameter, for errors.

    Raises:
        TypeError: the gradient is placed differently.
    """

    def __init__(
        self,
        param: DTensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        group: Mapping[str, Any],
        shard: Shard,
        name: str,
    ) -> None:
        if not is_sharded(gradient) or gradient.placements != param.placements:
            placed = tuple(gradient.placements) if is_sharded(gradient) else "none"
            raise TypeError(f"the gradient of {name} must have its placements, {tuple(param.placements)}, got {placed}")
        self.shard, self.group = shard, group
        self.weight, self.gradient = param.to_local(), gradient.to_local()
        self.state = {key: local(value) for key, value in state.items()}
        self.layout = tensor_layout(param.shape, group)  # of the whole tensor
        self.cut = self.layout is not None and is_cut(self.layout, group)
        self.factored = self.layout is not None and group["moments"] in FACTORED
        self.norm: Tensor  # of the whole gradient, as soon as the statistics are reduced
        self._sums: list[Tensor]
        self._row: Tensor  # row sums of the local rows, where they are whole
        self._sketch: tuple[Tensor, Tensor | None] | None = None
        self._offset = 0  # entries of the local grid that precede the first of this rank's
        self._first = 0  # row of the grid at which the local grid begins
        if self.layout is not None:
            self._local = self._local_layout(self.layout, tuple(param.shape))

    @property
    def stream(self) -> int:
        """Tells the random numbers of this part from those of others, and from those of a state that all hold."""
        return self.shard.start + self.cut

    def _local_layout(self, layout: Layout, shape: tuple[int, ...]) -> Layout:
        """Lay out the grid rows that this rank holds, from the first to the last whole chunk that it has a part of."""
        start, stop = (index * (layout.numel // shape[0]) for index in (self.shard.start, self.shard.stop))
        unit = layout.rows_per_chunk if self.cut or layout.rows_per_slice(layout.rows_per_chunk) is not None else 1
        self._first = start // (unit * layout.cols) * unit
        last = min(math.ceil(stop / (unit * layout.cols)) * unit, layout.rows) if stop > start else self._first
        self._offset = start - self._first * layout.cols
        rows = last - self._first
        return dataclasses.replace(layout, shape=(rows * layout.cols,), rows=rows)

    def _grid(self) -> Tensor:
        """View the local gradient as whole grid rows, zeros where entries are another rank's."""
        flat, missing = self.gradient.reshape(-1), self._local.numel - self.gradient.numel()
        if missing:
            flat = torch.nn.functional.pad(flat, (self._offset, missing - self._offset))
        return flat.view(self._local.rows, self._local.cols)

    def sums(self) -> list[Tensor]:
        """Give what is to be summed over the ranks: ‖g‖², and for the factored second moment Σg² by row and column."""
        if not self.factored:
            norm = torch.linalg.vector_norm(self.gradient.float(), dtype=torch.float32)
            return [norm.square().view(1)]
        assert self.layout is not None
        row, col = square_sums(self._grid(), self._local)
        if self.cut:
            rows = row.new_zeros(self.layout.rows)
            rows[self._rows] = row
            return [row.sum().view(1), col, rows]
        beta2 = self.group["betas"][1]
        self._row = row
        moved = beta2 * self.state["row"].sum() + (1 - beta2) * row.sum() / self.layout.cols
        return [row.sum().view(1), col, moved.view(1)]

    @property
    def _rows(self) -> slice:
        return slice(self._first, self._first + self._local.rows)

    def take(self, sums: list[Tensor]) -> None:
        """Take the sums of all ranks."""
        self.norm, self._sums = sums[0].sqrt().squeeze(0), sums[1:]

    def _whitening(self, t: int) -> Whitening | None:
        """Move R and C, and give the whitening of the local grid."""
        if not self.factored:
            return None
        assert self.layout is not None
        beta2, cut = self.group["betas"][1], self.cut
        col, last = self._sums
        row, col = means(last if cut else self._row, col, self.layout)
        mean = None if cut else last.squeeze(0) / self.layout.rows
        whitening = whiten_by(self.state, row, col, beta2, t, mean)
        if not cut:
            return whitening
        busy = None if whitening.busy is None else whitening.busy[self._rows]
        return Whitening(whitening.a[self._rows], whitening.b, busy)

    @property
    def adds_sketches(self) -> bool:
        """Whether the sketches of all ranks have to be summed."""
        return self.cut and self.group["sketch_size"] > 0

    def partial_sketches(self, projection: Projection) -> list[Tensor]:
        """Move R and C, and encode this rank's entries: p of all chunks of the tensor, and for "sketched" q."""
        assert self.layout is not None
        whitening = self._whitening(int(self.state["step"]) + 1)
        found = encode(self._grid(), self._local, whitening, projection, self.group)
        begin = self._first // self.layout.rows_per_chunk * self.layout.pieces
        padding = (0, 0, begin, self.layout.chunks - begin - self._local.chunks)
        return [torch.nn.functional.pad(part, padding) for part in found if part is not None]

    def take_sketches(self, p: Tensor, q: Tensor | None = None) -> None:
        """Take the sums of the partial sketches of all ranks."""
        self._sketch = p, q

    def apply(
        self,
        weight: Tensor,
        projection: Projection | None,
        lr: float,
        decay: float,
        generator: torch.Generator | None,
        rounding: torch.Generator | None,
    ) -> tuple[Update, Layout] | None:
        """Advance the state of a compressed tensor and move this rank's entries of it.

        Args:
            weight: the local part, contiguous.
            projection: A, or None.
            lr: learning rate times scale, negative to maximize.
            decay: learning rate times weight decay.
            generator: for bf16 sketches; the same on every rank where the state is.
            rounding: for bf16 weights, another on every rank.

        Returns:
            The sparse update and the layout that its chunks are of, or None where every entry moved.
        """
        assert self.layout is not None
        if self._sketch is not None:
            assert projection is not None
            update = sketched_update(*self._sketch, self.state, self.layout, projection, self.group, generator)
            self._apply_own(weight, update, self.layout, 0, lr, decay, rounding)
            return update, self.layout
        whitening = self._whitening(int(self.state["step"]))
        if not weight.numel():
            if not self.cut and self.group["moments"] == "sketched":
                self._total(self.gradient.new_zeros(2, dtype=torch.float32))  # as the others do
            return None
        grid, layout, group = self._grid(), self._local, self.group
        if group["recovered"] is None:
            assert whitening is not None
            apply_whitened(weight, grid, layout, whitening, group["eps"], lr, decay, rounding, self._offset)
            return None
        if self.cut:  # without a sketch, so each side of a boundary moves the top entries of its own part of a chunk
            update = Update(*select(grid, layout, whitening, group["recovered"], group["eps"]), None)
            self._apply_own(weight, update, layout, self._first * layout.cols, lr, decay, rounding)
        else:
            update = whitened_update(grid, whitening, self.state, layout, projection, group, generator, self._total)
            apply_sparse(weight, layout, update, lr, decay, rounding)
        return update, layout

    def _total(self, sums: Tensor) -> Tensor:
        """Sum over the ranks in the middle of an update, as "sketched" alone needs."""
        return _summed([self], [[sums]])[0][0]

    def _apply_own(
        self,
        weight: Tensor,
        update: Update,
        layout: Layout,
        begin: int,
        lr: float,
        decay: float,
        rounding: torch.Generator | None,
    ) -> None:
        """Apply the entries of an update that are this rank's; its layout begins at entry `begin` of the tensor."""
        position, value = entries(layout, update)
        position = position + (begin - self._first * layout.cols - self._offset)
        own = (position >= 0) & (position < weight.numel())
        apply_entries(weight, position[own], value[own], lr, decay, rounding)


def reduce_statistics(parts: Sequence[Part]) -> None:
    """Sum the norms and the statistics of the factored second moment over the ranks, in one all-reduce."""
    found = [part.sums() for part in parts]
    for part, sums in zip(parts, _summed(parts, found), strict=True):
        part.take(sums)


def reduce_sketches(parts: Iterable[Part], projection_of: Callable[[Any], Projection | None]) -> None:
    """Sum the partial sketches of the tensors whose chunks are cut over the ranks, in one all-reduce.

    Args:
        parts: that move in this step, on every rank the same.
        projection_of: gives A for a group.
    """
    cut, found = [part for part in parts if part.adds_sketches], []
    for part in cut:
        projection = projection_of(part.group)
        assert projection is not None
        found.append(part.partial_sketches(projection))
    for part, sums in zip(cut, _summed(cut, found), strict=True):
        part.take_sketches(*sums)


def _summed(parts: Sequence[Part], tensors: Sequence[list[Tensor]]) -> list[list[Tensor]]:
    """Sum the fp32 tensors of every part over its ranks: one all-reduce for each process group."""
    result, members = list(tensors), dict[Any, list[int]]()
    for number, part in enumerate(parts):
        if part.shard.mesh_dim is not None and part.shard.mesh.size(part.shard.mesh_dim) > 1:
            members.setdefault(part.shard.process_group, []).append(number)
    for process_group, numbers in members.items():
        flat = [tensor.reshape(-1) for number in numbers for tensor in tensors[number]]
        device = _device_of(parts[numbers[0]])
        total = torch.cat([piece.to(device) for piece in flat])
        dist.all_reduce(total, group=process_group)
        pieces = iter(total.split([piece.numel() for piece in flat]))
        for number in numbers:
            result[number] = [next(pieces).view(one.shape).to(one.device) for one in tensors[number]]
    return result


def _device_of(part: Part) -> torch.device:
    """Give the device on which the mesh communicates: with CPU offload it is not the parameters'."""
    kind = part.shard.mesh.device_type
    return part.gradient.device if part.gradient.device.type == kind else torch.device(kind)

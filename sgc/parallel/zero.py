"""DeepSpeed's flat partitions: which piece of which tensor lies where, and one update of all of them. (ours)

ZeRO hands the optimizer one long vector per parameter group and rank, cut where memory says and not where a tensor
ends. Chunked as it lies, its rows and columns mean nothing, norms and embeddings share one statistic, and the loss is
worse for it. But DeepSpeed knows what lies where: so each piece is treated as the part of a tensor that it is, with
that tensor's grid and chunks. What crosses a cut is summed over the ranks: the sums of g², and the sketches of the
chunks that are cut. Every rank then makes the update that one process would make.

State lies under "number.name" in the state of the partition, the number counting the tensors that the optimizer was
made with: "7.row" and "7.col" are of the whole tensor on every rank that holds a part of it, so that they fit any
number of ranks; sketches are of the chunks in sight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sgc import moments
from sgc.codec.layout import Layout
from sgc.codec.project import Projection
from sgc.state import QUANTIZED_BLOCK, Schema, state_schema, tensor_layout
from sgc.step import (
    Update,
    Whitening,
    adamw_update,
    apply_dense,
    apply_entries,
    apply_whitened,
    encode,
    entries,
    means,
    select,
    sketched_update,
    square_sums,
    whiten_by,
)

SPAN = "span"  # state of a piece: start, stop, at and the shape of its tensor, so that a checkpoint explains itself


@dataclass(frozen=True)
class Piece:
    """A part of a tensor in a flat partition."""

    number: int  # of the tensor among all that the optimizer was made with
    shape: tuple[int, ...]  # of the whole tensor
    start: int  # its first entry in the flattened tensor
    stop: int  # the one after its last
    at: int  # where it lies in the partition

    @property
    def numel(self) -> int:
        """Entries of the piece."""
        return self.stop - self.start

    @property
    def span(self) -> list[int]:
        """Say in numbers what the piece is."""
        return [self.start, self.stop, self.at, *self.shape]

    def window(self, layout: Layout) -> Window:
        """Give the whole rows of chunks of the tensor that the piece touches."""
        unit = layout.rows_per_chunk * layout.cols
        first, last = self.start // unit, math.ceil(self.stop / unit)
        rows = slice(first * layout.rows_per_chunk, min(last * layout.rows_per_chunk, layout.rows))
        begin, end = rows.start * layout.cols, min(rows.stop * layout.cols, layout.numel)
        seen = replace(layout, shape=(end - begin,), rows=rows.stop - rows.start)
        return Window(rows, seen, self.start - begin, slice(first * layout.pieces, last * layout.pieces))


@dataclass(frozen=True)
class Window:
    """What a piece sees of its tensor."""

    rows: slice  # of the tensor's grid
    layout: Layout  # of those rows
    offset: int  # entries of those rows before the piece
    chunks: slice  # of the tensor

    def grid(self, x: Tensor) -> Tensor:
        """Put a piece (entries,) in its rows, zeros around it."""
        after = self.layout.rows * self.layout.cols - self.offset - x.numel()
        x = torch.nn.functional.pad(x, (self.offset, after)) if self.offset or after else x
        return x.view(self.layout.rows, self.layout.cols)


@dataclass
class _Sight:
    """A piece on its way through one update."""

    piece: Piece
    gradient: Tensor  # (entries,) fp32
    layout: Layout | None  # of the whole tensor; None where it is kept dense
    window: Window | None
    sums: Tensor  # Σg²; then, where R and C are held, the row and the column sums of g² of the whole tensor
    whitening: Whitening | None = None  # of the window's rows
    p: Tensor | None = None  # the sketches of the window's chunks
    q: Tensor | None = None

    def seen(self) -> tuple[Layout, Window]:
        assert self.layout is not None  # asked of compressed tensors only
        assert self.window is not None
        return self.layout, self.window


@dataclass(frozen=True)
class Tools:
    """What the optimizer lends to an update."""

    lr: float  # negative to maximize
    decay: float  # learning rate times weight decay
    projection: Projection | None
    generator: Callable[[int, Tensor, Mapping[str, Any]], torch.Generator | None]  # of a tensor's number
    probe: Callable[[Piece, Layout, Projection | None, Mapping[str, Any], Update], None]


def find_pieces(flat: Tensor, tensors: Sequence[Tensor]) -> tuple[list[Piece], Any] | None:
    """Ask DeepSpeed which pieces of which tensors lie in a partition.

    Args:
        flat: what the optimizer is given to update.
        tensors: those that the optimizer was made with.

    Returns:
        The pieces and the process group over which partitions are spread, or None where it is no partition.
    """
    numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
    for owner in (getattr(tensor, "_z3_optimizer", None) for tensor in tensors):
        if owner is not None:
            return _pieces_of_stage_3(flat, owner, numbers)
    pieces, group = [], None
    for tensor in tensors:
        mapping = getattr(tensor, "_hp_mapping", None)
        group = getattr(tensor, "_dp_group", None) if group is None else group  # a rank may hold padding only
        if mapping is None or mapping.hp_fragment.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
            continue
        inside, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
        piece = Piece(numbers[id(tensor)], tuple(tensor.shape), whole.start, whole.start + whole.numel, inside.start)
        pieces.append(piece)
        group = tensor._dp_group  # type: ignore[attr-defined]  # DeepSpeed has put it there
    return None if group is None else (pieces, group)


def _pieces_of_stage_3(flat: Tensor, owner: Any, numbers: Mapping[int, int]) -> tuple[list[Piece], Any] | None:
    for params, partition in zip(owner.fp16_groups, owner.fp32_partitioned_groups_flat, strict=True):
        if partition is not flat:
            continue
        pieces, at = [], 0
        for param in params:
            length, rank = param.partition_numel(), dist.get_rank(param.ds_process_group)
            start, stop = (min(edge * length, param.ds_numel) for edge in (rank, rank + 1))
            if start < stop:
                pieces.append(Piece(numbers[id(param)], tuple(param.ds_shape), start, stop, at))
            at += length
        return pieces, params[0].ds_process_group
    return None


class Partition:
    """One flat partition as its pieces.

    Args:
        flat: the partition, 1-D.
        pieces: what lies in it; padding does not.
        process_group: over which the partitions are spread.
    """

    def __init__(self, flat: Tensor, pieces: Sequence[Piece], process_group: Any) -> None:
        self.flat, self.pieces, self.process_group = flat, list(pieces), process_group
        self._shared: list[tuple[int, tuple[int, ...], list[int]]] | None = None

    def schema(self, group: Mapping[str, Any]) -> Schema:
        """Name every tensor that the state of the partition holds, with its shape and dtype."""
        held = ((piece, name, tensor) for piece in self.pieces for name, tensor in piece_schema(piece, group).items())
        return {f"{piece.number}.{name}": tensor for piece, name, tensor in held}

    def check_state(self, saved: Mapping[str, Any], group: Mapping[str, Any]) -> None:
        """Refuse the state of another partition.

        Raises:
            ValueError: the pieces are others, or a tensor has another shape.
        """
        for piece in self.pieces:
            span = saved.get(f"{piece.number}.{SPAN}", torch.zeros(3)).tolist()
            if span != piece.span:
                raise ValueError(
                    f"this rank holds entries {piece.start} to {piece.stop} of tensor {piece.number}, the checkpoint "
                    f"{span[0]:.0f} to {span[1]:.0f}: it is of another model, another number of ranks or another stage "
                    "of ZeRO; sgc.zero_checkpoint.reshape_checkpoint rewrites one for other ranks"
                )
        for name, (shape, dtype) in self.schema(group).items():
            held = saved.get(name)
            if not isinstance(held, Tensor) or (tuple(held.shape), held.dtype) != (shape, dtype):
                found = f"{held.dtype} of shape {tuple(held.shape)}" if isinstance(held, Tensor) else "none"
                raise ValueError(f"the state {name} should be {dtype} of shape {shape}, the checkpoint holds {found}")

    def make_state(self, state: dict[str, Any], group: Mapping[str, Any]) -> None:
        """Fill an empty state."""
        for name, (shape, dtype) in self.schema(group).items():
            state[name] = torch.zeros(shape, dtype=dtype, device="cpu" if on_cpu(name) else self.flat.device)
        for piece in self.pieces:
            state[f"{piece.number}.{SPAN}"].copy_(torch.tensor(piece.span))

    @torch.no_grad()
    def update(self, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any], tools: Tools) -> int:
        """Make one update of all pieces; every rank of the process group must come here.

        Args:
            gradient: of the partition, 1-D.
            state: of the partition.
            group: the hyperparameters.
            tools: of the optimizer.

        Returns:
            How many tensors were left out because their gradients are not finite.

        Raises:
            ValueError: `rank` is set.
        """
        if group["rank"] is not None:
            raise ValueError(f"rank must be None under DeepSpeed, which cuts matrices into pieces, got {group['rank']}")
        if not state:
            self.make_state(state, group)
        sights = [self._look(piece, gradient, group) for piece in self.pieces]
        self._sum_statistics(sights, group)
        norms = torch.stack([sight.sums[0] for sight in sights]).tolist() if sights else []
        moving = [sight for sight, norm in zip(sights, norms, strict=True) if math.isfinite(norm) and norm > 0]
        for sight in moving:
            _advance(sight, _PieceState(state, sight.piece), group, tools)
        if tools.projection is not None:
            self._sum_cut_chunks(moving, group, tools.projection)
        for sight, norm in zip(sights, norms, strict=True):
            weight = self.flat.detach()[sight.piece.at : sight.piece.at + sight.piece.numel]
            if norm == 0:
                generator = tools.generator(sight.piece.number, weight, group)
                apply_dense(weight, None, 0.0, tools.decay, generator if group["stochastic_rounding"] else None)
            elif math.isfinite(norm):
                _apply(weight, sight, _PieceState(state, sight.piece), group, tools)
        return sum(not math.isfinite(norm) for norm in norms)

    def _look(self, piece: Piece, gradient: Tensor, group: Mapping[str, Any]) -> _Sight:
        """Take the sums of squares of a piece's gradient."""
        part = gradient[piece.at : piece.at + piece.numel].float()
        layout = tensor_layout(piece.shape, group)
        sums = part.new_zeros(_sums_size(layout, group))
        sums[0] = part.square().sum()
        if layout is None:
            return _Sight(piece, part, None, None, sums)
        window = piece.window(layout)
        if len(sums) > 1:
            row, col = sums[1:].split([layout.rows, layout.cols])
            row[window.rows], col[:] = square_sums(window.grid(part), window.layout)
        return _Sight(piece, part, layout, window, sums)

    def _sum_statistics(self, sights: Sequence[_Sight], group: Mapping[str, Any]) -> None:
        """Sum the squares of every shared tensor over the ranks: so R and C are one, and all ranks skip the same."""
        sizes = {n: _sums_size(tensor_layout(shape, group), group) for n, shape, _ in self._meet()}
        if not sizes:
            return
        buffer = torch.zeros(sum(sizes.values()), dtype=torch.float32, device=self.flat.device)
        parts = dict(zip(sizes, buffer.split(list(sizes.values())), strict=True))
        shared = [sight for sight in sights if sight.piece.number in parts]
        for sight in shared:
            parts[sight.piece.number].copy_(sight.sums)
        self._all_reduce(buffer)
        for sight in shared:
            sight.sums = parts[sight.piece.number]

    def _sum_cut_chunks(self, moving: Sequence[_Sight], group: Mapping[str, Any], projection: Projection) -> None:
        """Sum the sketches of the chunks that a cut goes through: partial sketches add."""
        places: list[tuple[int, slice]] = []  # number, chunks of the whole tensor
        width = 0
        for number, shape, cuts in self._meet():
            layout = tensor_layout(shape, group)
            if layout is None:
                continue
            unit = layout.rows_per_chunk * layout.cols
            width = max(width, min(projection.sketch_size, layout.chunk))
            units = sorted({cut // unit for cut in cuts if cut % unit})
            places += [(number, slice(at * layout.pieces, (at + 1) * layout.pieces)) for at in units]
        if not places:
            return
        kinds = 2 if group["moments"] == "sketched" else 1
        chunks = [place.stop - place.start for _, place in places]
        buffer = torch.zeros(kinds, sum(chunks), width, dtype=torch.float32, device=self.flat.device)
        by_number = {sight.piece.number: sight for sight in moving}
        cut: list[tuple[Tensor, Tensor]] = []  # own sketches, their place in the buffer
        for (number, place), part in zip(places, buffer.split(chunks, dim=1), strict=True):
            sight = by_number.get(number)
            window = None if sight is None else sight.seen()[1]
            if sight is None or window is None or not window.chunks.start <= place.start < window.chunks.stop:
                continue
            here = slice(place.start - window.chunks.start, place.stop - window.chunks.start)
            for sketches, kind in zip((sight.p, sight.q), part, strict=False):
                assert sketches is not None  # q only where there are two kinds
                cut.append((sketches[here], kind[:, : sketches.shape[1]]))
        for own, there in cut:
            there.copy_(own)
        self._all_reduce(buffer)
        for own, there in cut:
            own.copy_(there)

    def _meet(self) -> list[tuple[int, tuple[int, ...], list[int]]]:
        """Learn, once, which tensors lie on several ranks: number, shape and cuts."""
        if self._shared is None:
            held: list[Any] = [None] * dist.get_world_size(self.process_group)
            own = [(piece.number, piece.shape, piece.start) for piece in self.pieces]
            dist.all_gather_object(held, own, group=self.process_group)
            starts: dict[tuple[int, tuple[int, ...]], list[int]] = {}
            for number, shape, start in sorted(entry for rank in held for entry in rank):
                starts.setdefault((number, shape), []).append(start)
            self._shared = [(*tensor, cuts[1:]) for tensor, cuts in starts.items() if len(cuts) > 1]
        return self._shared

    def _all_reduce(self, buffer: Tensor) -> None:
        """Sum a buffer over the ranks, in place; an offloaded partition's goes over the accelerator."""
        if buffer.device.type == "cpu" and "nccl" in dist.get_backend(self.process_group):
            there = buffer.to(torch.accelerator.current_accelerator())
            dist.all_reduce(there, group=self.process_group)
            buffer.copy_(there)
        else:
            dist.all_reduce(buffer, group=self.process_group)


def on_cpu(name: str) -> bool:
    """Whether a state tensor of this name stays on the CPU: counts, and where pieces lie."""
    return name.rpartition(".")[2] in ("step", SPAN)


def piece_schema(piece: Piece, group: Mapping[str, Any]) -> Schema:
    """Name every tensor that the state of a piece holds, with its shape and dtype."""
    layout, held = tensor_layout(piece.shape, group), state_schema(piece.shape, group)
    schema: Schema = {SPAN: ((len(piece.span),), torch.int64)}
    for name, (shape, dtype) in held.items():
        if layout is None:
            schema[name] = (shape if name == "step" else (piece.numel,), dtype)
        elif name.endswith("_absmax"):
            continue  # follows its sketch
        elif "sketch" not in name:
            schema[name] = ((math.prod(shape),) if shape else (), dtype)
        else:
            chunks = piece.window(layout).layout.chunks
            schema[name] = ((chunks, shape[-1]), dtype)
            if name + "_absmax" in held:
                schema[name + "_absmax"] = ((math.ceil(chunks * shape[-1] / QUANTIZED_BLOCK),), torch.float32)
    return schema


def _sums_size(layout: Layout | None, group: Mapping[str, Any]) -> int:
    return 1 + (0 if layout is None or group["moments"] not in moments.FACTORED else layout.rows + layout.cols)


def _advance(sight: _Sight, state: dict[str, Any], group: Mapping[str, Any], tools: Tools) -> None:
    """Count an update, move R and C, and sketch the gradient."""
    state["step"] += 1
    if sight.layout is None:
        return
    layout, window = sight.seen()
    if group["moments"] in moments.FACTORED:
        row, col = sight.sums[1:].split([layout.rows, layout.cols])
        row, col = means(row, col, layout)
        a, b, busy = whiten_by(state, row, col, group["betas"][1], int(state["step"]))
        sight.whitening = Whitening(a[window.rows], b, None if busy is None else busy[window.rows])
    if tools.projection is not None:
        grid = window.grid(sight.gradient)
        sight.p, sight.q = encode(grid, window.layout, sight.whitening, tools.projection, group)


def _apply(weight: Tensor, sight: _Sight, state: dict[str, Any], group: Mapping[str, Any], tools: Tools) -> None:
    """Move the weights of a piece."""
    generator = tools.generator(sight.piece.number, weight, group)
    rounding = generator if group["stochastic_rounding"] else None
    if sight.layout is None:
        update = adamw_update(sight.gradient, state, group["betas"], group["eps"])
        apply_dense(weight, update, tools.lr, tools.decay, rounding)
        return
    layout, window = sight.seen()
    lr = tools.lr * moments.update_scale(layout.numel, layout.chunks, layout.chunk, group)
    if group["recovered"] is None:
        assert sight.whitening is not None  # without a sketch the rule is a factored one
        grid, at = window.grid(sight.gradient), window.offset
        apply_whitened(weight, grid, window.layout, sight.whitening, group["eps"], lr, tools.decay, rounding, at)
        return
    if tools.projection is None:
        grid = window.grid(sight.gradient)
        found = Update(*select(grid, window.layout, sight.whitening, group["recovered"], group["eps"]), None)
    else:
        assert sight.p is not None  # encoded
        found = sketched_update(sight.p, sight.q, state, window.layout, tools.projection, group, generator)
    position, value = entries(window.layout, found)
    position -= window.offset
    own = (position >= 0) & (position < weight.numel())
    apply_entries(weight, position[own], value[own], lr, tools.decay, rounding)
    tools.probe(sight.piece, window.layout, tools.projection, group, found)


class _PieceState(dict[str, Any]):
    """The state of one piece, inside that of its partition."""

    def __init__(self, state: dict[str, Any], piece: Piece) -> None:
        self._state, self._prefix = state, f"{piece.number}."
        super().__init__((n.removeprefix(self._prefix), v) for n, v in state.items() if n.startswith(self._prefix))

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._state[self._prefix + name] = value

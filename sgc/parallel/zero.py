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

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sgc.codec.encode import Whitening
from sgc.moments import RULES, Rates
from sgc.parallel.home import PENDING, Asked, Given, Home, Lend, Sum, side_by_side
from sgc.parallel.pieces import SPAN, Piece, find_pieces, piece_schema, sums_size
from sgc.state import Schema, tensor_layout
from sgc.step import Recovered, Update
from sgc.views import Summed, Tools, View
from sgc.whiten import means, square_sums


class Partition(Home):
    """One flat partition, 1-D, as its pieces: the home of all of them.

    Args:
        number: of the partition among all that the optimizer is given.
        flat: the partition.
        group: the hyperparameters.
        pieces: what lies in it; padding does not.
        process_group: over which the partitions are spread.
    """

    flat = True

    def __init__(
        self, number: int, flat: Tensor, group: dict[str, Any], pieces: Sequence[Piece], process_group: Any
    ) -> None:
        super().__init__(number, flat, group, "a partition")
        self.pieces, self.process_group = list(pieces), process_group
        self._shared: list[tuple[int, tuple[int, ...], list[int]]] | None = None

    # -- state

    def schema(self) -> Schema:
        """Name every tensor that the state of the partition holds, with its shape and dtype."""
        held = ((piece, n, tensor) for piece in self.pieces for n, tensor in piece_schema(piece, self.group).items())
        return {f"{piece.number}.{name}": tensor for piece, name, tensor in held}

    def own_names(self, held: Mapping[str, Any]) -> set[str]:
        """Name what a state holds of ours."""
        return held.keys() & (self.schema().keys() | {PENDING})

    def check_state(self, held: Mapping[str, Any], source: str) -> None:
        """Refuse the state of another partition.

        Raises:
            ValueError: the pieces are others, or a tensor has another shape.
        """
        for piece in self.pieces:
            span = held.get(f"{piece.number}.{SPAN}", torch.zeros(3)).tolist()
            if span != piece.span:
                raise ValueError(
                    f"this rank holds entries {piece.start} to {piece.stop} of tensor {piece.number}, {source} "
                    f"{span[0]:.0f} to {span[1]:.0f}: it is of another model, another number of ranks or another stage "
                    "of ZeRO; sgc.zero_checkpoint.reshape_checkpoint rewrites one for other ranks"
                )
        for name, (shape, dtype) in self.schema().items():
            value = held.get(name)
            if not isinstance(value, Tensor) or (tuple(value.shape), value.dtype) != (shape, dtype):
                found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "none"
                raise ValueError(f"the state {name} should be {dtype} of shape {shape}, {source} holds {found}")

    def new_state(self) -> dict[str, Any]:
        """Make the state, all zero but for what the pieces are."""
        state = {
            name: torch.zeros(shape, dtype=dtype, device=self._device(name))
            for name, (shape, dtype) in self.schema().items()
        }
        for piece in self.pieces:
            state[f"{piece.number}.{SPAN}"].copy_(torch.tensor(piece.span))
        return state

    def holds(self, state: Mapping[str, Any]) -> bool:
        """Whether a state is that of these pieces: DeepSpeed's bf16 optimizer steps once before it tells them."""
        return all(f"{piece.number}.{SPAN}" in state for piece in self.pieces)

    def _device(self, name: str) -> torch.device | str:
        return "cpu" if name.rpartition(".")[2] in ("step", SPAN) else self.param.device

    # -- one update of all pieces; every rank of the process group must come here

    def views(self, gradient: Tensor, held: Callable[[], dict[str, Any]], lend: Lend) -> list[View]:
        """View every piece.

        Raises:
            ValueError: `rank` is set.
        """
        if self.group["rank"] is not None:
            rank = self.group["rank"]
            raise ValueError(f"rank must be None under DeepSpeed, which cuts matrices into pieces, got {rank}")
        state, flat = held(), self.param.detach()
        views: list[View] = []
        for piece in self.pieces:
            own, prefix = slice(piece.at, piece.at + piece.numel), f"{piece.number}."
            part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            tools = lend(piece.number, self.param, self.group)
            views.append(PieceView(piece, flat[own], gradient[own].float(), part, self.group, tools))
        return views

    def measure(self, views: Sequence[PieceView]) -> None:
        """Sum the squares of every shared tensor over the ranks: so R and C are one, and all ranks skip the same."""
        for view in views:
            view.look()
        sizes = {n: sums_size(tensor_layout(shape, self.group), self.group) for n, shape, _ in self._meet()}
        parts = self._sum_parts(sizes, {view.piece.number: view.sums for view in views})
        for view in views:
            view.sums = parts.get(view.piece.number, view.sums)

    def sum_totals(self, asked: Asked) -> list[list[Tensor]]:
        """Sum two numbers of every shared tensor over the ranks."""
        own = {view.piece.number: sums for view, [sums] in asked.items() if isinstance(view, PieceView)}
        parts = self._sum_parts({number: 2 for number, *_ in self._meet()}, own)
        return [[parts.get(number, sums)] for number, sums in own.items()]

    def _sum_parts(self, sizes: Mapping[int, int], own: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Sum numbers of shared tensors over the ranks, given how many each tensor has and what they are here."""
        if not sizes:
            return {}
        buffer = torch.zeros(sum(sizes.values()), dtype=torch.float32, device=self.param.device)
        parts = dict(zip(sizes, buffer.split(list(sizes.values())), strict=True))
        for number, part in parts.items():
            if number in own:
                part.copy_(own[number])
        self._all_reduce(buffer)
        return parts

    def sum_cut_chunks(self, asked: Asked) -> list[list[Tensor]]:
        """Sum the sketches of the chunks that a cut goes through: partial sketches add."""
        views = {view.piece.number: (view, sums) for view, sums in asked.items() if isinstance(view, PieceView)}
        places = list(self._cut_chunks())  # number, chunks of the whole tensor
        if not places:
            return list(asked.values())
        width = max(self._width(shape) for _, shape, _ in self._meet())
        kinds = 2 if RULES[self.group["moments"]].square is not None else 1
        chunks = [place.stop - place.start for _, place in places]
        buffer = torch.zeros(kinds, sum(chunks), width, dtype=torch.float32, device=self.param.device)
        cut: list[tuple[Tensor, Tensor]] = []  # own sketches, their place in the buffer
        for (number, place), part in zip(places, buffer.split(chunks, dim=1), strict=True):
            if number not in views:
                continue
            view, sketches = views[number]
            assert view.window is not None
            seen = view.window.chunks
            if seen.start <= place.start < seen.stop:
                here = slice(place.start - seen.start, place.stop - seen.start)
                cut += [(own[here], kind[:, : own.shape[1]]) for own, kind in zip(sketches, part, strict=True)]
        for own, there in cut:
            there.copy_(own)
        self._all_reduce(buffer)
        for own, there in cut:
            own.copy_(there)
        return list(asked.values())

    def _cut_chunks(self) -> Iterator[tuple[int, slice]]:
        for number, shape, cuts in self._meet():
            layout = tensor_layout(shape, self.group)
            if layout is not None:
                unit = layout.rows_per_chunk * layout.cols
                for at in sorted({cut // unit for cut in cuts if cut % unit}):
                    yield number, slice(at * layout.chunks_per_row, (at + 1) * layout.chunks_per_row)

    def _width(self, shape: Sequence[int]) -> int:
        layout = tensor_layout(shape, self.group)
        return 0 if layout is None else min(self.group["sketch_size"], layout.chunk)

    def round(self, number: int, asked: Asked) -> Sum | None:
        """Return what every rank sums in a round of an update, whether it holds a piece that moves or not."""
        sums: list[Sum] = [self.sum_cut_chunks] if self.group["sketch_size"] else []
        if sums and RULES[self.group["moments"]].square is not None:
            sums.append(self.sum_totals)
        return sums[number] if number < len(sums) else None

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


class PieceView(View):
    """A piece of a tensor on its way through one update: it sees the rows of chunks that it touches."""

    def __init__(
        self,
        piece: Piece,
        weight: Tensor,
        gradient: Tensor,
        state: dict[str, Any],
        group: Mapping[str, Any],
        tools: Tools,
    ) -> None:
        super().__init__(piece, weight, gradient, lambda: state, piece.shape, group, tools)
        self.piece = piece
        self.sums: Tensor  # Σg²; then, where R and C are held, the row and the column sums of g² of the whole tensor
        if self.layout is not None:
            self.window = self.layout.window(piece.start, piece.stop)

    def look(self) -> None:
        """Take the sums of squares of this piece's gradient."""
        self.sums = self.gradient.new_zeros(sums_size(self.layout, self.group))
        self.sums[0] = self.gradient.square().sum()
        if self.whitens and self.layout is not None and self.window is not None:
            row, col = self.sums[1:].split([self.layout.rows, self.layout.cols])
            row[self.window.rows], col[:] = square_sums(self.grid(), self.seen)

    def norm(self) -> Tensor:
        """Return ‖g‖ of the whole tensor, known when the statistics are summed."""
        return self.sums[0].sqrt()

    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the means over all rows and columns of the tensor."""
        assert self.layout is not None
        row, col = self.sums[1:].split([self.layout.rows, self.layout.cols])
        return *means(row, col, self.layout), None

    def in_sight(self, whitening: Whitening) -> Whitening:
        """Return what whitens the rows in sight."""
        assert self.window is not None
        return whitening.of(self.window.rows)

    def encode(self, whitening: Whitening | None, squares: bool) -> Summed:
        """Sparsify and project; of the chunks that a cut goes through the ranks sum the sketches."""
        p, q = yield from super().encode(whitening, squares)
        p, *rest = yield [p] if q is None else [p, q]
        return p, rest[0] if rest else None

    def total(self, v: Tensor, index: Tensor) -> Any:
        """Sum v over the tensor, each chunk counted by the piece that holds its first entry."""
        assert self.window is not None
        first = self.seen.flat_index(torch.zeros_like(index[:, :1])) - self.window.offset
        own = ((first >= 0) & (first < self.weight.numel())).expand_as(index)
        lengths = self.seen.lengths(index.device)
        real = own if lengths is None else own & (index < lengths[:, None])
        [sums] = yield [torch.stack([(v * own).sum(), real.sum()])]
        return sums.unbind()

    def apply(self, index: Tensor, value: Tensor, rates: Rates) -> None:
        """Move this piece's entries among those that an update names."""
        assert self.window is not None
        self.apply_own(index, value, self.seen, self.window.offset, rates)


class Harness:
    """DeepSpeed's ZeRO: knows a partition, and has its pieces updated side by side on all ranks.

    Args:
        given: the tensors that the optimizer was made with.
    """

    def __init__(self, given: Given) -> None:
        self._given = given
        self.partitions: dict[Tensor, Partition] = {}

    def home(self, number: int, param: Tensor, group: dict[str, Any], name: str) -> Home | None:
        """Return the pieces of what DeepSpeed has put in the place of tensors, or None where it is no partition."""
        if param not in self.partitions:
            if id(param) in self._given.ids or (found := find_pieces(param, self._given.tensors())) is None:
                return None
            self.partitions[param] = Partition(number, param, group, *found)
        self.partitions[param].group = group
        return self.partitions[param]

    def measure(self, work: Sequence[tuple[Home, list[View]]]) -> None:
        """Sum the statistics of each partition over the ranks."""
        for home, views in work:
            assert isinstance(home, Partition)
            home.measure([view for view in views if isinstance(view, PieceView)])

    def run(self, work: Sequence[tuple[Home, Mapping[View, Update]]]) -> dict[View, Recovered | None]:
        """Run the updates of each partition's pieces side by side."""
        found: dict[View, Recovered | None] = {}
        for home, updates in work:
            assert isinstance(home, Partition)
            found |= side_by_side(updates, home.round)
        return found

    def held_tensors(self) -> list[Tensor]:
        """List the partitions."""
        return list(self.partitions)

"""What lies where in DeepSpeed's flat partitions: pieces of tensors, and their state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sgc.codec.layout import Layout
from sgc.moments import RULES
from sgc.state import DTYPES, MOMENTS, SCALES, Schema, state_schema, tensor_layout

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
        """Describe the piece in numbers."""
        return [self.start, self.stop, self.at, *self.shape]


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


def piece_schema(piece: Piece, group: Mapping[str, Any]) -> Schema:
    """Name every tensor that the state of a piece holds, with its shape and dtype."""
    layout, held = tensor_layout(piece.shape, group), state_schema(piece.shape, group)
    schema: Schema = {SPAN: ((len(piece.span),), torch.int64)}
    for name, (shape, dtype) in held.items():
        if layout is None:
            schema[name] = (shape if name == "step" else (piece.numel,), dtype)
        elif name.endswith(SCALES):
            continue  # follows its sketch
        elif name not in MOMENTS:
            schema[name] = ((math.prod(shape),) if shape else (), dtype)
        else:
            chunks, storage = layout.window(piece.start, piece.stop).layout.chunks, DTYPES[group["state_dtype"]]
            schema[name] = ((chunks, shape[-1]), dtype)
            if storage.block:
                schema[name + SCALES] = ((math.ceil(chunks * shape[-1] / storage.block),), torch.float32)
    return schema


def sums_size(layout: Layout | None, group: Mapping[str, Any]) -> int:
    """Count the numbers of a tensor that ranks sum before its update."""
    return 1 + (0 if layout is None or not RULES[group["moments"]].whitens else layout.rows + layout.cols)

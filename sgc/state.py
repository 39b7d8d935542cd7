"""What the optimizer holds for a tensor: names, shapes, dtypes and bytes, and how a moment lies in each dtype."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from sgc.apply import stochastic_round
from sgc.codec.layout import Layout, is_compressed, make_layout, matrix_shape
from sgc.codec.project import Projection
from sgc.moments import RULES, SQUARE_OF_SKETCH

SCALES = "_absmax"  # the end of the name of the scales that lie beside a moment in blocks
Schema = dict[str, tuple[tuple[int, ...], torch.dtype]]


# ------------------------------------------------------------------------------------------------ dtypes of moments


class Storage(Protocol):
    """How a moment is held between steps."""

    dtype: torch.dtype  # of the state tensor
    block: int  # entries that share a scale; 0: there are no scales
    draws: bool  # whether holding a moment takes random numbers

    def check(self) -> None:
        """Raise ImportError where what it needs is not installed."""

    def read(self, state: Mapping[str, Tensor], name: str) -> Tensor:
        """Return a moment in fp32, as it lies; where that is what is held, it may be changed in place."""

    def write(self, state: dict[str, Any], name: str, moment: Tensor, generator: torch.Generator | None) -> None:
        """Hold a moment."""


class Exact:
    """A moment in fp32, changed in place."""

    dtype, block, draws = torch.float32, 0, False

    def check(self) -> None:  # noqa: D102  # as Storage
        return

    def read(self, state: Mapping[str, Tensor], name: str) -> Tensor:  # noqa: D102
        return state[name]

    def write(self, state: dict[str, Any], name: str, moment: Tensor, generator: torch.Generator | None) -> None:  # noqa: D102
        if state[name].data_ptr() != moment.data_ptr():
            state[name].copy_(moment.view_as(state[name]))


class Rounded:
    """A moment in bf16, stochastically rounded."""

    dtype, block, draws = torch.bfloat16, 0, True

    def check(self) -> None:  # noqa: D102
        return

    def read(self, state: Mapping[str, Tensor], name: str) -> Tensor:  # noqa: D102
        return state[name].float()

    def write(self, state: dict[str, Any], name: str, moment: Tensor, generator: torch.Generator | None) -> None:  # noqa: D102
        assert generator is not None  # made wherever the state is bf16
        state[name].copy_(stochastic_round(moment, generator).view_as(state[name]))


class Blockwise:
    """A moment in 8 bits, a scale for every 256 entries, by the dynamic maps of bitsandbytes' own 8-bit Adam."""

    dtype, block, draws = torch.uint8, 256, False

    def check(self) -> None:  # noqa: D102
        _bitsandbytes()

    def read(self, state: Mapping[str, Tensor], name: str) -> Tensor:  # noqa: D102
        bnb, held = _bitsandbytes(), state[name]
        scales, code = state[name + SCALES].view(-1), _code(bnb, name).to(held.device)
        return bnb.dequantize_blockwise(held, absmax=scales, code=code, blocksize=self.block)

    def write(self, state: dict[str, Any], name: str, moment: Tensor, generator: torch.Generator | None) -> None:  # noqa: D102
        bnb = _bitsandbytes()
        code = _code(bnb, name).to(moment.device)
        quantized, info = bnb.quantize_blockwise(moment, code=code, blocksize=self.block)
        state[name].copy_(quantized.view_as(state[name]))
        state[name + SCALES].view(-1).copy_(info.absmax)


DTYPES: dict[str, Storage] = {"float32": Exact(), "bfloat16": Rounded(), "int8": Blockwise()}


def read_held(state: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a held moment (c, k) in fp32: a view of the state itself where that is fp32, else a copy."""
    moment = _storage_of(state[name]).read(state, name)
    return moment.flatten(0, -2) if moment.dim() > 2 else moment  # (dim 0, chunks of a slice, k)


def write_held(state: dict[str, Any], name: str, moment: Tensor, generator: torch.Generator | None) -> None:
    """Hold a moment; nothing is to be done for fp32 that was changed in place."""
    _storage_of(state[name]).write(state, name, moment, generator)


def _storage_of(held: Tensor) -> Storage:
    return next(storage for storage in DTYPES.values() if storage.dtype is held.dtype)


def _bitsandbytes() -> ModuleType:
    try:
        import bitsandbytes.functional as bnb
    except ImportError as error:
        raise ImportError('state_dtype="int8" needs bitsandbytes: pip install "sgc[bnb]"') from error
    return bnb


def _code(bnb: ModuleType, name: str) -> Tensor:
    """Return the map from 8 bits to numbers: signed, but for a moment that is never negative."""
    signed = name != SQUARE_OF_SKETCH
    key = "dynamic" if signed else "udynamic"
    if key not in bnb.name2qmap:
        bnb.name2qmap[key] = bnb.create_dynamic_map(signed=signed)
    return bnb.name2qmap[key]


# ------------------------------------------------------------------------------------------------ schema

MOMENTS = {name for rule in RULES.values() for name in rule.held}
# Every name that the state of a tensor may hold, whatever the rule: others may keep tensors beside it by other names.
NAMES = {"step", "exp_avg", "exp_avg_sq", "basis", "row", "col"} | MOMENTS | {name + SCALES for name in MOMENTS}


def tensor_layout(shape: Sequence[int], group: Mapping[str, Any]) -> Layout | None:
    """Return the chunks that a tensor's state is made of, or None where the tensor is not compressed."""
    shape = tuple(shape)
    if not is_compressed(shape, group["min_size"]):
        return None
    if has_basis(shape, group):
        return make_layout((group["rank"], max(matrix_shape(shape))), group["chunk_size"], within_rows=True)
    return make_layout(shape, group["chunk_size"])


def has_basis(shape: Sequence[int], group: Mapping[str, Any]) -> bool:
    """Whether a tensor is compressed doubly: `rank` is given, and it is a matrix."""
    return group["rank"] is not None and min(matrix_shape(tuple(shape))) > 1


def is_doubly_compressed(shape: Sequence[int], group: Mapping[str, Any]) -> bool:
    """Whether the state of a tensor holds a basis."""
    return tensor_layout(shape, group) is not None and has_basis(shape, group)


def state_schema(shape: Sequence[int], group: Mapping[str, Any]) -> Schema:
    """Name every tensor that the state of a tensor holds, with its shape and dtype.

    What belongs to single indices of dim 0 has that dimension first, so that it can be sharded as the tensor itself is;
    row-major, it is the same as without: `row` (rows,), sketches (c, k).
    """
    layout = tensor_layout(shape, group)
    schema: Schema = {"step": ((), torch.float32)}
    if layout is None:
        return schema | dict.fromkeys(("exp_avg", "exp_avg_sq"), (tuple(shape), torch.float32))
    whole = has_basis(shape, group)  # a layout of PᵀG: its dim 0 is not the tensor's
    if whole:
        schema["basis"] = ((min(matrix_shape(tuple(shape))), group["rank"]), torch.float32)
    rule = RULES[group["moments"]]
    if rule.whitens:
        row = (layout.rows,) if whole else _lead(shape, layout.rows_per_slice(), (layout.rows,))
        schema |= {"row": (row, torch.float32), "col": ((layout.cols,), torch.float32)}
    k, pieces = min(group["sketch_size"], layout.chunk), None if whole else chunks_per_slice(layout)
    sketch = _lead(shape, pieces, (layout.chunks, k), k)
    storage = DTYPES[group["state_dtype"]]
    for name in rule.held if group["sketch_size"] else ():
        schema[name] = (sketch, storage.dtype)
        if storage.block:
            blocks = None if pieces is None or pieces * k % storage.block else pieces * k // storage.block
            scales = _lead(shape, blocks, (math.ceil(math.prod(sketch) / storage.block),))
            schema[name + SCALES] = (scales, torch.float32)
    return schema


def chunks_per_slice(layout: Layout) -> int | None:
    """Return the chunks in one index of dim 0, or None where an index of it cuts a chunk."""
    rows = layout.rows_per_slice(layout.rows_per_chunk)
    return None if rows is None else rows // layout.rows_per_chunk * layout.chunks_per_row


def is_cut(layout: Layout, group: Mapping[str, Any]) -> bool:
    """Whether a boundary between indices of dim 0 may cut what the state of a tensor is made of."""
    if group["recovered"] is None:  # no sketch, and every entry moves
        return layout.rows_per_slice() is None
    pieces = chunks_per_slice(layout)
    if pieces is None:
        return True
    block = DTYPES[group["state_dtype"]].block if group["sketch_size"] else 0
    return bool(block and pieces * min(group["sketch_size"], layout.chunk) % block)


def _lead(shape: Sequence[int], per_slice: int | None, flat: tuple[int, ...], *last: int) -> tuple[int, ...]:
    """Return the shape (dim 0, per slice, *last), or the flat one where that is the same or there are no slices."""
    return flat if per_slice is None or per_slice == 1 else (shape[0], per_slice, *last)


def new_state(schema: Schema, device: torch.device) -> dict[str, Tensor]:
    """Make the state of a schema, all zero; counts stay on the CPU."""
    return {
        name: torch.zeros(shape, dtype=dtype, device="cpu" if name == "step" else device)
        for name, (shape, dtype) in schema.items()
    }


# ------------------------------------------------------------------------------------------------ bytes


def schema_bytes(schema: Schema) -> int:
    """Sum the bytes of all tensors of a schema."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in schema.values())


def projection_bytes(shapes: Iterable[Sequence[int]], group: Mapping[str, Any]) -> int:
    """Count the bytes of the A that the tensors of a group share, as far as it is held."""
    projection = Projection(group["sketch_size"], group["seed"])
    layouts = [tensor_layout(shape, group) for shape in shapes]
    widths = [layout.chunk for layout in layouts if layout is not None and group["sketch_size"] < layout.chunk]
    return max((4 * n * group["sketch_size"] for n in widths if projection.holds(n)), default=0)

"""What the optimizer holds for a tensor: names, shapes, dtypes and bytes, and how a sketch lies in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sgc.codec.layout import Layout, is_compressed, make_layout, matrix_shape
from sgc.codec.project import Projection
from sgc.moments import FACTORED

STATE_DTYPES = ("float32", "bfloat16", "int8")
QUANTIZED_BLOCK = 256  # entries that share one absmax
# Every name that the state of a tensor may hold, whatever the rule: others may keep tensors beside it by other names.
NAMES = {"step", "exp_avg", "exp_avg_sq", "basis", "row", "col"}
NAMES |= {name + end for name in ("sketch", "sketch_sq", "square_sketch") for end in ("", "_absmax")}
Schema = dict[str, tuple[tuple[int, ...], torch.dtype]]


def tensor_layout(shape: Sequence[int], group: Mapping[str, Any]) -> Layout | None:
    """Give the chunks that a tensor's state is made of, or None where the tensor is kept dense."""
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
    rule = group["moments"]
    if rule in FACTORED:
        row = (layout.rows,) if whole else _lead(shape, layout.rows_per_slice(), (layout.rows,))
        schema |= {"row": (row, torch.float32), "col": ((layout.cols,), torch.float32)}
    second = {"subspace": ("sketch_sq",), "sketched": ("square_sketch",)}.get(rule, ())
    k = min(group["sketch_size"], layout.chunk)
    pieces = None if whole else chunks_per_slice(layout)
    sketch = _lead(shape, pieces, (layout.chunks, k), k)
    for name in ("sketch", *second) if group["sketch_size"] else ():
        if group["state_dtype"] == "int8":
            schema[name] = (sketch, torch.uint8)
            blocks = None if pieces is None or pieces * k % QUANTIZED_BLOCK else pieces * k // QUANTIZED_BLOCK
            absmax = _lead(shape, blocks, (math.ceil(math.prod(sketch) / QUANTIZED_BLOCK),))
            schema[name + "_absmax"] = (absmax, torch.float32)
        else:
            schema[name] = (sketch, getattr(torch, group["state_dtype"]))
    return schema


def chunks_per_slice(layout: Layout) -> int | None:
    """Give the chunks in one index of dim 0, or None where an index of it cuts a chunk."""
    rows = layout.rows_per_slice(layout.rows_per_chunk)
    return None if rows is None else rows // layout.rows_per_chunk * layout.pieces


def _lead(shape: Sequence[int], per_slice: int | None, flat: tuple[int, ...], *last: int) -> tuple[int, ...]:
    """Give the shape (dim 0, per slice, *last), or the flat one where that is the same or there are no slices."""
    return flat if per_slice is None or per_slice == 1 else (shape[0], per_slice, *last)


def schema_bytes(schema: Schema) -> int:
    """Bytes of all tensors of a schema."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in schema.values())


def projection_bytes(shapes: Iterable[Sequence[int]], group: Mapping[str, Any]) -> int:
    """Bytes of the A that the tensors of a group share, as far as it is held."""
    projection = Projection(group["sketch_size"], group["seed"])
    layouts = [tensor_layout(shape, group) for shape in shapes]
    widths = [layout.chunk for layout in layouts if layout is not None and group["sketch_size"] < layout.chunk]
    return max((4 * n * group["sketch_size"] for n in widths if projection.holds(n)), default=0)


def budget_ladder(fixed: Mapping[str, Any]) -> Iterable[dict[str, int]]:
    """Yield (chunk_size, sketch_size, sparsity) from the largest state to the smallest, keeping what is fixed.

    k = 8·s throughout, as where `sparsity` is not given; small chunks learned better at equal n/k, and are cheaper.
    """
    ladder = [(n, 8 * s, s) for n, s in ((128, 8), (128, 4), (256, 4), (256, 2), (256, 1), (512, 1), (1024, 1))]
    sketched = [dict(zip(("chunk_size", "sketch_size", "sparsity"), sizes, strict=True)) for sizes in ladder]
    seen = []
    for picked in [*sketched, {"sketch_size": 0}]:
        free = {name: size for name, size in picked.items() if name not in fixed}
        if free not in seen:
            seen.append(free)
            yield free


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 to bf16 up or down at random, so that the mean of the result is x.

    A bf16 is the upper half of an fp32: 16 random bits added below the cut carry into it with the right probability.
    """
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    return ((x.view(torch.int32) + noise) & -65536).view(torch.float32).to(torch.bfloat16)


def read_held(state: dict[str, Any], name: str) -> Tensor:
    """Give a held moment (c, k) in fp32: a view of the state itself where that is fp32, else a copy."""
    held = state[name]
    held = held.flatten(0, -2) if held.dim() > 2 else held  # (dim 0, chunks of a slice, k)
    if held.dtype is torch.uint8:
        bnb = _bitsandbytes()
        absmax, code = state[name + "_absmax"].view(-1), _code(bnb, name).to(held.device)
        return bnb.dequantize_blockwise(held, absmax=absmax, code=code, blocksize=QUANTIZED_BLOCK)
    return held if held.dtype is torch.float32 else held.float()


def write_held(state: dict[str, Any], name: str, moment: Tensor, generator: torch.Generator | None) -> None:
    """Hold a moment: nothing to do for fp32, which was changed in place; bf16 is rounded stochastically."""
    held = state.get(name)
    if held is None or held.dtype is torch.uint8:
        bnb = _bitsandbytes()
        code = _code(bnb, name).to(moment.device)
        quantized, info = bnb.quantize_blockwise(moment, code=code, blocksize=QUANTIZED_BLOCK)
        if held is None:
            state[name], state[name + "_absmax"] = quantized, info.absmax
        else:
            held.copy_(quantized.view_as(held))
            state[name + "_absmax"].view(-1).copy_(info.absmax)
    elif held.dtype is torch.bfloat16:
        assert generator is not None
        held.copy_(stochastic_round(moment, generator).view_as(held))
    elif held.data_ptr() != moment.data_ptr():
        held.copy_(moment.view_as(held))


def check_state_dtype(state_dtype: str) -> None:
    """Raise ImportError where what a storage form needs is not installed."""
    if state_dtype == "int8":
        _bitsandbytes()


def _bitsandbytes() -> ModuleType:
    try:
        import bitsandbytes.functional as bnb
    except ImportError as error:
        raise ImportError('state_dtype="int8" needs bitsandbytes: pip install "sgc[bnb]"') from error
    return bnb


def _code(bnb: ModuleType, name: str) -> Tensor:
    """The dynamic maps of bitsandbytes' own 8-bit Adam: signed for the first moment, unsigned for the second."""
    signed = name != "sketch_sq"
    key = "dynamic" if signed else "udynamic"
    if key not in bnb.name2qmap:
        bnb.name2qmap[key] = bnb.create_dynamic_map(signed=signed)
    return bnb.name2qmap[key]

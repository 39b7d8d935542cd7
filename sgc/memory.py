"""What the optimizer holds for a tensor: names, shapes, dtypes and bytes, before anything is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from sgc.codec.layout import Layout, is_compressed, make_layout, matrix_shape
from sgc.codec.project import Projection
from sgc.moments import FACTORED
from sgc.storage import QUANTIZED_BLOCK

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

"""What the optimizer's arguments must be, each rule a sentence that names the value."""

from __future__ import annotations

import math
import warnings
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sgc import memory
from sgc.codec.layout import matrix_shape
from sgc.codec.project import check_projection
from sgc.codec.recover import METHODS
from sgc.moments import FACTORED, RULES
from sgc.storage import STATE_DTYPES, check_state_dtype

SKETCH_PER_ENTRY = 8  # numbers of a sketch per entry encoded, where `sparsity` is not given


def check_group(group: dict[str, Any]) -> None:
    """Check the hyperparameters of a group, and put `state_dtype`, `betas` and `recovered` in their plain form.

    Raises:
        ValueError: a value out of range.
        TypeError: a size that is not a whole number, or a rate that is no number.
        ImportError: state_dtype is "int8" and bitsandbytes is missing.
    """
    for name in ("chunk_size", "sketch_size", "sparsity", "recovered", "rank", "refresh_every", "min_size", "seed"):
        optional = name in ("chunk_size", "sparsity", "recovered", "rank")
        if not (isinstance(group[name], int) or (optional and group[name] is None)):
            raise TypeError(f"{name} must be a whole number{' or None' * optional}, got {group[name]!r}")
    for name in ("lr", "eps", "weight_decay", "scale"):
        optional = name == "scale"
        if not (isinstance(group[name], Real | Tensor) or (optional and group[name] is None)):
            raise TypeError(f"{name} must be a number{' or None' * optional}, got {group[name]!r}")
    if not (isinstance(group["betas"], tuple | list) and all(isinstance(beta, Real) for beta in group["betas"])):
        raise TypeError(f"betas must be two numbers in [0, 1), got {group['betas']!r}")
    if group["sparsity"] is None and group["sketch_size"] > 0:
        group["sparsity"] = max(1, group["sketch_size"] // SKETCH_PER_ENTRY)
    group["recovered"] = group["sparsity"] if group["recovered"] is None else group["recovered"]
    group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")
    group["betas"] = tuple(group["betas"])
    n, k, s, r = (group[name] for name in ("chunk_size", "sketch_size", "sparsity", "recovered"))
    most = math.inf if n is None else n
    bound = "the tensor's size" if n is None else f"chunk_size={n}"
    rules = [
        (float(group["lr"]) >= 0, "lr must not be negative", "lr"),
        (group["eps"] >= 0, "eps must not be negative", "eps"),
        (group["weight_decay"] >= 0, "weight_decay must not be negative", "weight_decay"),
        (
            len(group["betas"]) == 2 and all(0 <= b < 1 for b in group["betas"]),
            "betas must be two numbers in [0, 1)",
            "betas",
        ),
        (n is None or n >= 2, "chunk_size must be at least 2, or None for one chunk per tensor", "chunk_size"),
        (k >= 0, "sketch_size must not be negative", "sketch_size"),
        (s is None or 1 <= s <= most, f"sparsity must be in [1, {bound}]", "sparsity"),
        (r is None or 1 <= r <= most, f"recovered must be in [1, {bound}]", "recovered"),
        (
            k == 0 or k >= most or r is None or r <= k,
            f"recovered (by default sparsity) must be in [1, sketch_size={k}]",
            "recovered",
        ),
        (group["moments"] in RULES, f"moments must be one of {', '.join(RULES)}", "moments"),
        (group["recovery"] in METHODS, f"recovery must be one of {', '.join(METHODS)}", "recovery"),
        (group["state_dtype"] in STATE_DTYPES, f"state_dtype must be one of {', '.join(STATE_DTYPES)}", "state_dtype"),
        (group["scale"] is None or group["scale"] > 0, "scale must be positive", "scale"),
        (group["rank"] is None or group["rank"] >= 1, "rank must be at least 1", "rank"),
        (group["refresh_every"] >= 1, "refresh_every must be at least 1", "refresh_every"),
        (group["min_size"] >= 0, "min_size must not be negative", "min_size"),
        (0 <= group["seed"] < 2**63, "seed must be in [0, 2⁶³)", "seed"),
    ]
    for holds, rule, name in rules:
        if not holds:
            raise ValueError(f"{rule}, got {group[name]!r}")
    if k == 0 and group["moments"] not in FACTORED:
        raise ValueError(
            f"sketch_size=0 keeps only the row and column means of {' and '.join(map(repr, FACTORED))}; "
            f"moments={group['moments']!r} has none"
        )
    check_state_dtype(group["state_dtype"])
    if r is not None and 0 < k < min(4 * r, most):
        warnings.warn(
            f"sketch_size={k} is small for recovering {r} entries of each chunk: sketch_size={4 * r} would do",
            stacklevel=4,
        )


def check_param(param: Any, number: int, group: dict[str, Any]) -> None:
    """Check that a parameter can be trained with the hyperparameters of its group.

    Raises:
        TypeError: it is not a dense real floating-point tensor.
        ValueError: its smaller side is below `rank`, or its projection would be too large to make.
    """
    name, tensor = param if isinstance(param, tuple) else (f"parameter {number}", param)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"SGC trains tensors, {name} is {type(tensor).__name__}")
    if not tensor.is_floating_point() or tensor.layout is not torch.strided:
        raise TypeError(f"SGC trains dense real floating-point tensors, {name} is {tensor.dtype} in {tensor.layout}")
    layout = memory.tensor_layout(tensor.shape, group)
    if layout is None:
        return
    if memory.has_basis(tensor.shape, group):
        rows, cols = matrix_shape(tuple(tensor.shape))
        if group["rank"] > min(rows, cols):
            raise ValueError(f"rank must be at most {min(rows, cols)} for {name} ({rows}×{cols}), got {group['rank']}")
    try:
        check_projection(layout.chunk, group["sketch_size"])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None

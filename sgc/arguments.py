"""What the optimizer's arguments must be, each rule a sentence that names the value."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from sgc.checks import flag, plain, rate, real, sequence, shown, whole, word
from sgc.codec.layout import matrix_shape
from sgc.codec.project import check_projection
from sgc.codec.recover import METHODS
from sgc.moments import RULES
from sgc.state import DTYPES, has_basis, tensor_layout

SKETCH_PER_ENTRY = 8  # numbers of a sketch per entry encoded, where `sparsity` is not given
OPTIONAL = ("chunk_size", "sparsity", "recovered", "rank", "scale")  # None is one of their values
SIZES = {  # and the least value of those whose rule does not depend on others
    "chunk_size": None,
    "sketch_size": 0,
    "sparsity": None,
    "recovered": None,
    "rank": 1,
    "refresh_every": 1,
    "min_size": 0,
    "seed": 0,
}
# What the state of a tensor was made by: a checkpoint of another configuration is refused.
CONFIGURATION = ("chunk_size", "sketch_size", "sparsity", "moments", "rank", "min_size", "state_dtype", "seed")
FACTOR = "gradient_factor"  # in every group: what clipping and unscaling made of the last compressed gradients
RATES = ("lr", "eps", "weight_decay")
TRAINED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # torch computes nothing in narrower ones
FLAGS = ("stochastic_rounding", "maximize")
CHOICES: dict[str, Iterable[str]] = {"moments": RULES, "recovery": METHODS, "state_dtype": DTYPES}
# AdamW's other switches. These choose an implementation: SGC takes either value, and does the same.
IGNORED = ("foreach", "fused")
# These would change what is computed, or promise what SGC does not do.
SWITCHED_OFF = {
    "amsgrad": "SGC keeps no maximum of the second moment",
    "capturable": "a step of SGC is not captured in a CUDA graph",
    "differentiable": "autograd does not go through a step of SGC",
}


def check_group(group: dict[str, Any]) -> None:
    """Check the hyperparameters of a group, and put each in its plain form: Python's numbers, flags and texts.

    The one place that judges them: for the constructor, for groups that are added and for those of a checkpoint. Only a
    learning rate that is a tensor of one entry stays as it is, since a scheduler may write into it.

    Raises:
        ValueError: a value out of range, or a switch of AdamW's that SGC does not have is on.
        TypeError: a value of another kind.
        ImportError: state_dtype is "int8" and bitsandbytes is missing.
    """
    for name, least in SIZES.items():
        group[name] = whole(name, group[name], at_least=least, optional=name in OPTIONAL)
    for name in RATES:
        number = rate(name, group[name])
        group[name] = group[name] if name == "lr" and isinstance(group[name], Tensor) else number
    group["scale"] = real("scale", group["scale"], optional=True)
    group["betas"] = _checked_betas(group["betas"])
    for name in FLAGS:
        group[name] = flag(name, group[name])
    for name in IGNORED:
        group[name] = flag(name, group[name], optional=True)
    for name, why in SWITCHED_OFF.items():
        group[name] = flag(name, group[name])
        if group[name]:
            raise ValueError(f"{name} must be False, since {why}, got True")
    if isinstance(group["state_dtype"], torch.dtype):
        group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")
    for name, words in CHOICES.items():
        group[name] = word(name, group[name], words)
    _check_sizes(group)
    DTYPES[group["state_dtype"]].check()


def _checked_betas(given: Any) -> tuple[float, ...]:
    betas = sequence("betas", given, "two numbers in [0, 1)")
    if any(isinstance(beta, bool) or not isinstance(plain(beta), Real) for beta in betas):
        raise TypeError(f"betas must be two numbers in [0, 1), got {shown(given)}")
    if len(betas) != 2 or not all(0 <= plain(beta) < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {shown(given)}")
    return tuple(float(plain(beta)) for beta in betas)


def _check_sizes(group: dict[str, Any]) -> None:
    """Complete the sizes of a group by what they default to, and check each against the others."""
    if group["sparsity"] is None and group["sketch_size"] > 0:
        group["sparsity"] = max(1, group["sketch_size"] // SKETCH_PER_ENTRY)
    group["recovered"] = group["sparsity"] if group["recovered"] is None else group["recovered"]
    n, k, s, r = (group[name] for name in ("chunk_size", "sketch_size", "sparsity", "recovered"))
    most = math.inf if n is None else n
    bound = "the tensor's size" if n is None else f"chunk_size={n}"
    rules = [
        (n is None or n >= 2, "chunk_size must be at least 2, or None for one chunk per tensor", "chunk_size"),
        (s is None or 1 <= s <= most, f"sparsity must be in [1, {bound}]", "sparsity"),
        (r is None or 1 <= r <= most, f"recovered must be in [1, {bound}]", "recovered"),
        (
            k == 0 or k >= most or r is None or r <= k,
            f"recovered (by default sparsity) must be in [1, sketch_size={k}]",
            "recovered",
        ),
        (group["scale"] is None or group["scale"] > 0, "scale must be positive", "scale"),
    ]
    for holds, rule, name in rules:
        if not holds:
            raise ValueError(f"{rule}, got {shown(group[name])}")
    if k == 0 and not RULES[group["moments"]].whitens:
        whitening = " and ".join(repr(name) for name, rule in RULES.items() if rule.whitens)
        raise ValueError(
            f"sketch_size=0 keeps only the row and column means of {whitening}; moments={group['moments']!r} has none"
        )


def rates_of(group: Mapping[str, Any]) -> tuple[float, float]:
    """Return the learning rate of a group, negative where it ascends, and what a step takes off its weights."""
    lr = float(group["lr"])
    return -lr if group["maximize"] else lr, lr * group["weight_decay"]


def warn_small_sketch(group: Mapping[str, Any]) -> None:
    """Warn where the sketches of a group are too small for what is to be recovered from them."""
    n, k, r = (group[name] for name in ("chunk_size", "sketch_size", "recovered"))
    if r is not None and 0 < k < min(4 * r, math.inf if n is None else n):
        warnings.warn(
            f"sketch_size={k} is small for recovering {r} entries of each chunk: sketch_size={4 * r} would do",
            stacklevel=4,
        )


def check_param(param: Any, number: int, group: dict[str, Any]) -> None:
    """Check that a parameter can be trained with the hyperparameters of its group; a frozen one need not be.

    Raises:
        TypeError: it is not a dense real floating-point tensor.
        ValueError: its smaller side is below `rank`, or its projection would be too large to make.
    """
    name, tensor = param if isinstance(param, tuple) else (f"parameter {number}", param)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"SGC trains tensors, {name} is {type(tensor).__name__}")
    if not tensor.requires_grad:
        return
    if is_lazy(tensor):
        raise TypeError(f"SGC needs the shapes of what it trains, {name} has none yet: run the model once before")
    if tensor.dtype not in TRAINED or tensor.layout is not torch.strided:
        raise TypeError(f"SGC trains dense real floating-point tensors, {name} is {tensor.dtype} in {tensor.layout}")
    layout = tensor_layout(tensor.shape, group)
    if layout is None:
        return
    if has_basis(tensor.shape, group):
        rows, cols = matrix_shape(tuple(tensor.shape))
        if group["rank"] > min(rows, cols):
            raise ValueError(f"rank must be at most {min(rows, cols)} for {name} ({rows}×{cols}), got {group['rank']}")
    try:
        check_projection(layout.chunk, group["sketch_size"])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None

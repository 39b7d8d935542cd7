"""How a sketch is held between steps (fp32, bf16, blockwise int8), and stochastic rounding to bf16."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

STATE_DTYPES = ("float32", "bfloat16", "int8")
QUANTIZED_BLOCK = 256  # entries that share one absmax


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

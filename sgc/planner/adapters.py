"""LoRA and QLoRA as a plan sees them: peft's own adapters, and linear layers that hold 4 bits per weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sgc.planner.models import PlanError

BLOCK = 64  # entries of NF4 that share a scale
SCALES = 256  # scales that share one of their own, under double quantization


def lora(model: Any, rank: int) -> nn.Module:
    """Put adapters of this rank on every linear layer but the head, as peft's "all-linear" does."""
    try:
        import peft
    except ImportError as error:
        raise PlanError('a plan with LoRA needs peft: pip install "sgc[hf]"') from error
    causal = not type(model).__name__.endswith("ForSequenceClassification")
    task = "CAUSAL_LM" if causal else "SEQ_CLS"
    config = peft.LoraConfig(task_type=task, r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return peft.get_peft_model(model, config)


def qlora(model: Any, rank: int) -> nn.Module:
    """Hold the adapted layers' weights in 4 bits first (NF4 with double quantization, as QLoRA does)."""
    adapted = lora(model, rank)
    for module in adapted.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Linear):
            module.base_layer = FourBitLinear(base)  # type: ignore[assignment]  # a module, which the stub can't know
    return adapted


def four_bit_bytes(entries: int) -> int:
    """Count the bytes of a weight in NF4 with double quantization, its scales and their code counted.

    Those are what bitsandbytes 0.50 holds: half a byte per entry, a byte per block of 64, a fp32 scale per 256 of
    those, their fp32 mean, and two maps of 16 and 256 fp32 numbers.
    """
    blocks = math.ceil(entries / BLOCK)
    return math.ceil(entries / 2) + blocks + 4 * math.ceil(blocks / SCALES) + 4 + 4 * 16 + 4 * 256


class FourBitLinear(nn.Module):
    """A linear layer that holds the bytes of 4-bit weights and dequantizes them to multiply: shapes and no numbers."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias
        held = torch.empty(four_bit_bytes(base.weight.numel()), dtype=torch.uint8)
        self.register_buffer("held", held)
        self.dtype = base.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the dequantized weight, which backward makes again."""
        return _Multiply.apply(x.to(self.dtype), self.held, self.bias, self.out_features)  # type: ignore[no-any-return]


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        ctx.save_for_backward(held)
        ctx.shape = (rows, x.shape[-1])
        return linear(x, x.new_empty(ctx.shape), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.shape), None, None, None

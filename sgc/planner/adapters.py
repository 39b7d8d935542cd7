"""LoRA and QLoRA as a plan sees them: layers that hold and multiply what peft's and bitsandbytes' do.

Shapes and bytes are theirs (tests compare), numbers are not: peft's own can't be put on tensors without memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sgc.planner.models import PlanError
from sgc.planner.trace import is_linear

BLOCK = 64  # entries of NF4 that share a scale
SCANS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")  # whose `out_proj` peft refuses to adapt
EXPERTS = ("mixtral", "qwen2_moe")  # whose stacked experts, and those of their kin, peft adapts as "all-linear", too
SCALES = 256  # scales that share one of their own, under double quantization


def lora(model: Any, rank: int) -> nn.Module:
    """Put adapters of this rank in fp32 on every linear layer but the head, as peft's "all-linear" does."""
    return _adapted(model, rank, four_bits=False)


def qlora(model: Any, rank: int) -> nn.Module:
    """Hold the adapted layers' weights in 4 bits, too (NF4 with double quantization)."""
    return _adapted(model, rank, four_bits=True)


def _adapted(model: Any, rank: int, four_bits: bool) -> nn.Module:
    head = model.get_output_embeddings()
    classifier = [part for name in ("score", "classifier") if (part := getattr(model, name, None)) is not None]
    kind = model.config.model_type
    if conversion_patterns().get(kind, kind) in EXPERTS:
        raise PlanError("not planned: peft adapts this model's experts, too")
    scans = kind in SCANS
    whole = getattr(model, "_keep_in_fp32_modules", None) or ()  # which transformers quantizes for none
    kept = {id(module) for part in (head, *classifier) if part is not None for module in part.modules()}
    for param in model.parameters():
        param.requires_grad_(False)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if is_linear(layer) and id(layer) not in kept and not (scans and name == "out_proj"):
                setattr(parent, name, Adapted(layer, rank, four_bits and name not in whole))
    for number, part in enumerate(classifier):  # peft trains a copy of it and keeps the first
        first = nn.Module()
        for name, param in part.named_parameters():
            first.register_parameter(name.replace(".", "_"), nn.Parameter(torch.empty_like(param), requires_grad=False))
        model.add_module(f"first_classifier_{number}", first)
        part.requires_grad_(True)
    return model


def conversion_patterns() -> dict[str, str]:
    """Return the kinds of models that transformers converts as those of another kind: so peft finds stacked experts."""
    from transformers import conversion_mapping

    found: dict[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return found


def four_bit_bytes(entries: int) -> int:
    """Count the bytes of a weight in NF4 with double quantization, its scales and their maps counted.

    Those are what bitsandbytes 0.50 holds: half a byte per entry, a byte per block of 64, a fp32 scale per 256 of
    those, their fp32 mean, and two maps of 16 and 256 fp32 numbers.
    """
    blocks = math.ceil(entries / BLOCK)
    return math.ceil(entries / 2) + blocks + 4 * math.ceil(blocks / SCALES) + 4 + 4 * 16 + 4 * 256


class Adapted(nn.Module):
    """A frozen linear layer with a low-rank one beside it."""

    def __init__(self, base: nn.Module, rank: int, four_bits: bool) -> None:
        super().__init__()
        weight: Tensor = base.weight  # type: ignore[assignment]  # a layer's weight is no module
        rows, cols = weight.shape if isinstance(base, nn.Linear) else weight.T.shape  # Conv1D is the other way round
        self.base = FourBitLinear(base, rows, cols) if four_bits else base
        self.lora_A = nn.Parameter(torch.empty(rank, cols, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(rows, rank, dtype=torch.float32))

    @property
    def weight(self) -> Tensor:
        """The layer's own weight, which some models use without the layer, as they do peft's."""
        if isinstance(self.base, FourBitLinear):
            raise PlanError("not in 4 bits: this model uses a layer's weight without the layer")
        found: Tensor = self.base.get_parameter("weight")
        return found

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias."""
        return dict(self.base.named_parameters()).get("bias")

    def forward(self, x: Tensor) -> Tensor:
        """Add the adapter's product, made in fp32."""
        result = self.base(x)
        dtype = result.dtype
        x = x.to(self.lora_A.dtype)
        result = result + linear(linear(x, self.lora_A), self.lora_B) * 2.0
        return result.to(dtype)


class FourBitLinear(nn.Module):
    """A linear layer that holds the bytes of 4-bit weights and dequantizes them to multiply."""

    held: Tensor

    def __init__(self, base: nn.Module, rows: int, cols: int) -> None:
        super().__init__()
        self.rows, self.cols, self.bias = rows, cols, base.bias
        self.register_buffer("held", torch.empty(four_bit_bytes(rows * cols), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the dequantized weight, which backward makes again."""
        found: Tensor = _Multiply.apply(x, self.held, self.bias, self.rows)
        return found


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

"""A gradient of which sums are held: a tensor of its parameter's shape and dtype that loops can work with as ever.

Its norm is the gradient's; it can be added to, scaled, unscaled and zeroed. So accumulation, clipping, loss scaling and
`zero_grad` work as they are, whoever calls them, and `step` remains the only place where weights move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from sgc.arguments import FACTOR
from sgc.backward.sums import Buffer, Slot, Sums, agreement

aten = torch.ops.aten


class CompressedGradient(Tensor):
    """A gradient of which the sketch is held: what `param.grad` of an attached parameter is.

    Defined are its 2-norm, adding a gradient, scaling in place by one number (as clipping and `GradScaler` do) and
    zeroing; all else would need the gradient itself, and raises RuntimeError. (ours)
    """

    @staticmethod
    def __new__(cls, slot: Slot, buffer: Buffer) -> CompressedGradient:  # noqa: D102
        param = slot.param
        return torch.Tensor._make_wrapper_subclass(cls, param.shape, dtype=param.dtype, device=param.device)

    def __init__(self, slot: Slot, buffer: Buffer) -> None:
        self.slot, self.buffer = slot, buffer
        self.restart()

    def restart(self) -> None:
        """Become the gradient to which nothing has been added; the buffer is the caller's to clear."""
        slot = self.slot
        self.first = self.compressor.first(slot)  # the first entry held, where there is no sketch
        self.scale = torch.ones((), dtype=torch.float32, device=slot.param.device)  # c, in fp32 whatever scales it
        factor = 1.0 if slot.sample_every else slot.group.get(FACTOR, 1.0)
        self.prescale: Tensor | None = None  # multiplies what is added
        if isinstance(factor, Tensor) or factor != 1:
            self.prescale = torch.as_tensor(factor, dtype=torch.float32, device=slot.param.device)
            self.scale = self.scale / self.prescale
        self.early = True  # it was compressed before anybody could clip or unscale it
        self.scaled = False  # somebody has clipped or unscaled it
        self.spent = False  # a step has used it
        self.zeroed = False  # it is a gradient of zeros, not one that never came

    @property
    def compressor(self) -> Any:
        """Who compressed it, a `Compressor`."""
        return self.slot.compressor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # a builtin for a method

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes tensor_contents, which repr() never gives
        return f"CompressedGradient(shape={tuple(self.shape)}, held={self.slot.shapes[0]})"

    @property
    def data(self) -> CompressedGradient:
        """Return the gradient itself; torch would let anything be put here, to no effect."""
        return self

    @data.setter
    def data(self, other: Tensor) -> None:
        if other is not self:
            raise RuntimeError("a compressed gradient can't be given other data: set param.grad to a whole gradient")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a compressed gradient can't be pickled: optimizer.state_dict() holds what it has summed")

    def share_memory_(self) -> CompressedGradient:
        """Refuse: it has no memory of its own, which torch does not ask."""
        raise RuntimeError("a compressed gradient can't be shared: call optimizer.zero_grad() first")

    def sums(self) -> Sums:
        """View what is held."""
        return self.slot.sums(self.buffer.flat)

    def true_norm(self) -> Tensor:
        """Return ‖g‖₂, fp32: exact for one micro-batch on one rank, else estimated from the sketches."""
        self.compressor.finish()
        sums = self.sums()
        return self.scale.abs() / self.compressor.world_size * (agreement(sums) * sums.norm_sq).sqrt()

    def step_norm(self) -> Tensor:
        """Return ‖g‖₂, or −1 where no rank had a gradient."""
        norm = self.true_norm()
        return norm if self.zeroed else torch.where(self.sums().number > 0, norm, -1.0)

    def use(self) -> tuple[Tensor, Tensor]:
        """Use the gradient for a step; return c/W, and what Σgᵢ² is multiplied by to be g²."""
        sums = self.sums()
        self.spent = True
        if self.early:
            self.compressor.expect(self.slot, self.scale if self.prescale is None else self.scale * self.prescale)
        factor = self.scale / self.compressor.world_size
        return factor, agreement(sums) * factor.square()

    @classmethod
    @_disable_dynamo
    def __torch_dispatch__(  # type: ignore[override]  # the stub has no signature to agree with
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            raise RuntimeError(
                f"{func} needs the gradient itself, and of a compressed gradient only a sketch is held: its norm, "
                "adding, scaling and zeroing are defined; without optimizer.attach(model) gradients are whole"
            )
        return handler(func, *args, **(kwargs or {}))


# ---- what loops, clippers and scalers do with gradients --------------------------------------------------------------


def _norm(
    _: Any,
    gradient: Tensor,
    order: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    if not isinstance(gradient, CompressedGradient) or order != 2 or dim is not None or keepdim:
        raise RuntimeError(f"of a whole compressed gradient only the 2-norm is known, got order={order}, dim={dim}")
    norm = gradient.true_norm()
    return norm if dtype is None else norm.to(dtype)


def _number(gradient: Any, value: Any) -> Tensor:
    """Return what scales a gradient as an fp32 number beside it."""
    one = isinstance(value, Tensor) and value.numel() == 1 and not isinstance(value, CompressedGradient)
    if not isinstance(gradient, CompressedGradient) or not (one or isinstance(value, int | float)):
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise RuntimeError(f"a compressed gradient is scaled by one real number, and scales nothing itself, got {got}")
    if isinstance(value, Tensor) and value.is_complex():
        raise RuntimeError(f"a compressed gradient is scaled by one real number, got one in {value.dtype}")
    return torch.as_tensor(value, dtype=torch.float32, device=gradient.scale.device).reshape(())


def _scale(_: Any, gradient: Any, factor: Any) -> CompressedGradient:
    number = _number(gradient, factor)
    gradient.compressor.finish()
    gradient.scale, gradient.scaled = gradient.scale * number, True
    return gradient


def _divide(_: Any, gradient: Any, divisor: Any) -> CompressedGradient:
    number = _number(gradient, divisor)
    gradient.compressor.finish()
    gradient.scale, gradient.scaled = gradient.scale / number, True
    return gradient


def _zero(_: Any, gradient: CompressedGradient) -> CompressedGradient:
    gradient.buffer.wait()
    gradient.slot.clear(gradient.buffer)
    gradient.restart()
    gradient.zeroed = True
    return gradient


def _add(func: Any, gradient: Tensor, other: Any, *, alpha: float = 1) -> CompressedGradient:
    whole = isinstance(other, Tensor) and not isinstance(other, CompressedGradient) and other.shape == gradient.shape
    accumulates = func is aten.add_.Tensor or torch._C._current_graph_task_id() != -1  # a backward is under way
    if not whole or not isinstance(gradient, CompressedGradient) or alpha != 1 or not accumulates:
        raise RuntimeError("to a compressed gradient a whole one of its parameter is added in place, and nothing else")
    gradient.compressor.add(gradient.slot, other)
    return gradient


def _refuse_to_move(_: Any, gradient: CompressedGradient, *args: Any, **kwargs: Any) -> None:
    raise RuntimeError(
        "a compressed gradient keeps its dtype and device: call optimizer.zero_grad() before the model is moved or cast"
    )


def _itself(_: Any, gradient: CompressedGradient, *args: Any, **kwargs: Any) -> CompressedGradient:
    return gradient


def _each(func: Any, gradients: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
    """Run a foreach operator one by one, since the list mixes whole and compressed gradients."""
    found = [_FOREACH[func](gradient, *args, **kwargs) for gradient in gradients]
    return found if func is aten._foreach_norm.Scalar else None


def _each_by(func: Any, gradients: Sequence[Tensor], others: Sequence[Any]) -> Any:
    for gradient, other in zip(gradients, others, strict=True):
        _FOREACH_BY[func](gradient, other)


def _unscale(func: Any, gradients: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """Note for GradScaler non-finite gradients, and divide by the loss scale."""
    whole = [gradient for gradient in gradients if not isinstance(gradient, CompressedGradient)]
    if whole:
        func(whole, found_inf, inv_scale)
    for gradient in gradients:
        if isinstance(gradient, CompressedGradient):
            norm_sq = gradient.true_norm().square()
            found_inf.copy_(torch.maximum(found_inf, (~norm_sq.isfinite()).to(found_inf)))
            _scale(func, gradient, inv_scale)


_FOREACH: dict[Any, Callable[..., Any]] = {
    aten._foreach_norm.Scalar: torch.linalg.vector_norm,
    aten._foreach_mul_.Scalar: Tensor.mul_,
    aten._foreach_mul_.Tensor: Tensor.mul_,
    aten._foreach_div_.Scalar: Tensor.div_,
    aten._foreach_div_.Tensor: Tensor.div_,
    aten._foreach_zero_.default: Tensor.zero_,
}
_FOREACH_BY: dict[Any, Callable[..., Any]] = {
    aten._foreach_mul_.ScalarList: Tensor.mul_,
    aten._foreach_mul_.List: Tensor.mul_,
    aten._foreach_div_.ScalarList: Tensor.div_,
    aten._foreach_div_.List: Tensor.div_,
}
_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.linalg_vector_norm.default: _norm,
    aten.mul_.Tensor: _scale,
    aten.mul_.Scalar: _scale,
    aten.div_.Tensor: _divide,
    aten.div_.Scalar: _divide,
    aten.zero_.default: _zero,
    aten.add_.Tensor: _add,
    aten.add.Tensor: _add,
    aten.detach.default: _itself,
    aten.detach_.default: _itself,
    aten._to_copy.default: _refuse_to_move,
    aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
    **dict.fromkeys(_FOREACH, _each),
    **dict.fromkeys(_FOREACH_BY, _each_by),
}

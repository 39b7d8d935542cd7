"""Compressed gradients: every gradient is compressed as soon as backward has made it, and freed. (ours)

`param.grad` of an attached parameter becomes a `CompressedGradient`: a tensor of its shape and dtype that holds the
sketch. Its norm is the gradient's; it can be added to, scaled, unscaled and zeroed. So accumulation, clipping,
loss scaling and `zero_grad` work as they are, whoever calls them, and `step` remains the only place where weights move.

Where there is no sketch to hold a gradient in, one entry in m is held, another at every step, so that each has its turn
once in m steps and then moves √m times as far: the update has the norm of a whole one. That is linear, and whitened
when all is known: micro-batches and ranks make the update of their batch, but for the estimate of R and C.

With a sketch: let gᵢ be what a micro-batch on a rank added (times the c of the last step, since R and C are of clipped
and unscaled gradients), W the ranks, and c the factor that clipping and unscaling put on the sum afterwards, so the
gradient is g = (c/W)·Σgᵢ. Held are Σpᵢ, with pᵢ = A·top_s(gᵢ / √v̂ᵢ) and v̂ᵢ made of R, C and the mean of gᵢ² so far;
Σ‖gᵢ‖²; Σ‖pᵢ‖²; and the sums of the row and column means of gᵢ². The second moment needs (Σgᵢ)², which is larger than
Σgᵢ² by up to their number N where the gᵢ agree; ‖Σpᵢ‖²/Σ‖pᵢ‖² of each tensor estimates by how much.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from sgc.arguments import FACTOR, check_group
from sgc.checks import whole
from sgc.codec.encode import encode
from sgc.codec.layout import Layout
from sgc.codec.project import mix
from sgc.moments import RULES
from sgc.parallel import ranks
from sgc.state import has_basis, tensor_layout
from sgc.surroundings import shielded
from sgc.whiten import gradient_norm, mean_squares, whiten

if TYPE_CHECKING:
    from sgc.optimizer import SGC

BUCKET_ENTRIES = 1 << 22  # fp32 numbers that ranks sum in one message (16 MiB)
aten = torch.ops.aten
_compressors = weakref.WeakSet["Compressor"]()  # of all optimizers


class Sums(NamedTuple):
    """Views of one tensor's part of a buffer, each a sum over micro-batches (after `finish`, over ranks too)."""

    p: Tensor  # (c, k) sketches; without a sketch (⌈d/m⌉,) entries of the gradient
    q: Tensor | None  # (c, k) sketches of squares, for "sketched"
    row: Tensor  # (rows,) row means of gᵢ²; empty for rules without
    col: Tensor  # (cols,)
    norm_sq: Tensor  # () ‖gᵢ‖²
    sketch_norm_sq: Tensor  # () ‖pᵢ‖²
    number: Tensor  # () gradients added


class Buffer:
    """The sums of a bucket. Gradients hold it, so it is freed when the last of them is dropped."""

    def __init__(self, entries: int, device: torch.device) -> None:
        self.flat = torch.zeros(entries, dtype=torch.float32, device=device)
        self.earlier: Tensor | None = None  # reduced already when more was added
        self.work: Any = None  # the all-reduce under way
        self.reduced = False

    def wait(self) -> None:
        """Wait for the all-reduce under way."""
        if self.work is not None:
            self.work.wait()
            self.work, self.reduced = None, True
            if self.earlier is not None:
                self.flat += self.earlier
                self.earlier = None

    def reopen(self) -> None:
        """Take further gradients after an all-reduce: what is summed over ranks is kept apart."""
        self.wait()
        if self.reduced:
            self.earlier, self.flat, self.reduced = self.flat, torch.zeros_like(self.flat), False


class Slot:
    """One attached parameter: its chunks, and where its sums lie in the buffer of its bucket.

    A gradient holds its slot, so a slot must not hold its parameter, nor a group of them. A weak reference to the
    parameter would keep torch from swapping its contents, as `model.to` may do: the compressor, which holds both, is
    asked for them.
    """

    def __init__(
        self, compressor: Compressor, number: int, layout: Layout, group: Mapping[str, Any], sample_every: int
    ) -> None:
        self._compressor = weakref.ref(compressor)
        self.key = number  # of the parameter, when it was attached
        self.number: int | None = number  # of the parameter now; None: its group has left the optimizer
        self.layout = layout
        self.sample_every = 0 if group["sketch_size"] else sample_every  # m; 0: a sketch is held
        self.shapes = _shapes(layout, group, sample_every)
        self.entries = sum(map(math.prod, self.shapes))
        self.bucket = Bucket([self])
        self.start = 0

    def part(self, flat: Tensor) -> Tensor:
        """Give this tensor's part of a bucket's flat numbers."""
        return flat[self.start : self.start + self.entries]

    def sums(self, flat: Tensor) -> Sums:
        """View this tensor's part of a bucket's flat numbers."""
        pieces = self.part(flat).split([math.prod(shape) for shape in self.shapes])
        p, q, row, col, scalars = (piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True))
        return Sums(p, q if q.numel() else None, row, col, *scalars.unbind())

    def clear(self, buffer: Buffer) -> None:
        """Take this tensor's sums out of a buffer."""
        for flat in (buffer.flat, buffer.earlier):
            if flat is not None:
                self.part(flat).zero_()

    def first(self, t: int) -> int:
        """Give the first entry whose gradient is held for update t; it takes the turns of a cycle in random order."""
        cycle, turn = divmod(t - 1, self.sample_every)
        key = mix(mix(self.group["seed"] & 0xFFFFFFFF) ^ cycle)
        return sorted(range(self.sample_every), key=lambda entry: mix(key ^ (entry + 1)))[turn]

    @property
    def compressor(self) -> Compressor:
        """Give who compresses its gradients."""
        compressor = self._compressor()
        if compressor is None:
            raise RuntimeError("the optimizer of this compressed gradient is gone: set param.grad to None")
        return compressor

    @property
    def param(self) -> Tensor:
        """Give the parameter."""
        return self.compressor.params[self.key]

    @property
    def group(self) -> dict[str, Any]:
        """Give the hyperparameters."""
        return self.compressor.groups[self.key]

    @property
    def held(self) -> CompressedGradient | None:
        """The gradient, if it is compressed."""
        gradient = self.param.grad
        return gradient if isinstance(gradient, CompressedGradient) and gradient.slot is self else None


class Bucket:
    """Slots that share a buffer, so that ranks sum them in one message."""

    def __init__(self, slots: list[Slot]) -> None:
        self.slots = slots
        self.waiting: set[int] = set()  # keys of the slots that the backward under way has not reached
        self.sent = False
        self._buffer: Callable[[], Buffer | None] = lambda: None
        start = 0
        for slot in slots:
            slot.bucket, slot.start, start = self, start, start + slot.entries
        self.entries = start

    def buffer(self) -> Buffer | None:
        """Give the buffer, if a gradient holds one."""
        return self._buffer()

    def make(self) -> Buffer:
        """Give the buffer, a new one if no gradient holds one."""
        buffer = self._buffer()
        if buffer is None:
            buffer = Buffer(self.entries, self.slots[0].param.device)
            self._buffer = weakref.ref(buffer)
        return buffer

    def open(self) -> Buffer:
        """Give the buffer, ready to take gradients."""
        buffer = self.make()
        buffer.reopen()
        return buffer


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
        """Be the gradient to which nothing has been added; the buffer is the caller's to clear."""
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
    def compressor(self) -> Compressor:
        """Give who compressed it."""
        return self.slot.compressor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # a builtin for a method

    def __repr__(self) -> str:  # type: ignore[override]  # torch's takes tensor_contents, which repr() never gives
        return f"CompressedGradient(shape={tuple(self.shape)}, held={self.slot.shapes[0]})"

    @property
    def data(self) -> CompressedGradient:
        """Give the gradient itself; torch would let anything be put here, to no effect."""
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
        """Give ‖g‖₂, fp32: exact for one micro-batch on one rank, else estimated from the sketches."""
        self.compressor.finish()
        sums = self.sums()
        return self.scale.abs() / self.compressor.world_size * (agreement(sums) * sums.norm_sq).sqrt()

    def step_norm(self) -> Tensor:
        """Give ‖g‖₂, or −1 where no rank had a gradient."""
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


def agreement(sums: Sums) -> Tensor:
    """Estimate (Σgᵢ)² / Σgᵢ², at most N, by ‖Σpᵢ‖² / Σ‖pᵢ‖²; 1 for a single gradient."""
    share = sums.p.square().sum() / sums.sketch_norm_sq.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(sums.number > 1, torch.minimum(share, sums.number), 1.0)


def rewhitening(held: Tensor, beta2: float, used: Tensor, true: Tensor) -> Tensor:
    """Give √(mean v̂ as used ÷ mean v̂ as it should have been), from C and the column means of g² in both."""
    tiny = torch.finfo(torch.float32).tiny
    before = beta2 * held.mean()
    root_mean = [(before + (1 - beta2) * col.mean()).clamp(min=tiny).sqrt() for col in (used, true)]
    return root_mean[0] / root_mean[1]


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
    """Give what scales a gradient as an fp32 number beside it."""
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
    """Do a foreach operator one by one, since the list mixes whole and compressed gradients."""
    found = [_FOREACH[func](gradient, *args, **kwargs) for gradient in gradients]
    return found if func is aten._foreach_norm.Scalar else None


def _each_by(func: Any, gradients: Sequence[Tensor], others: Sequence[Any]) -> Any:
    for gradient, other in zip(gradients, others, strict=True):
        _FOREACH_BY[func](gradient, other)


def _unscale(func: Any, gradients: Sequence[Tensor], found_inf: Tensor, inv_scale: Tensor) -> None:
    """GradScaler: note non-finite gradients, and divide by the loss scale."""
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


# ---- hooks -----------------------------------------------------------------------------------------------------------


class Compressor:
    """The hooks of one optimizer on one model, and the sums over micro-batches and ranks."""

    def __init__(self, optimizer: SGC, model: nn.Module, sample_every: int) -> None:
        _check_model(optimizer, model)
        sample_every = whole("sample_every", sample_every, at_least=1)
        self._optimizer = weakref.ref(optimizer)
        self.params = {number: param for number, param, _ in optimizer._numbered()}  # by the keys of slots
        self.groups = {number: group for number, _, group in optimizer._numbered()}
        self.slots = {slot.param: slot for slot in _slots(self, optimizer, sample_every)}
        if not self.slots:
            raise ValueError("no gradient can be compressed: every trained tensor is smaller than its min_size")
        self.world_size = 1
        self._sent_bytes = self._reduced_bytes = 0  # to the ranks since the last step, and for it
        self._group: Any = None
        self._sending: list[Buffer] = []
        self._last = False  # whether ranks sum after the backward under way
        self._unsummed = False
        self._callback_queued = False
        self._order: list[Bucket] = []
        self._alone = not _has_group()
        self._take_back: Callable[[], Any] = lambda: None
        for other in list(_compressors):
            if not self.slots.keys().isdisjoint(other.slots):
                other.remove()  # of two optimizers the newer compresses
        _compressors.add(self)
        if not self._alone:
            self._leave_to_ddp_what_it_needs(model)
        self._handles = [param.register_post_accumulate_grad_hook(self._hook()) for param in self.slots]
        if self._order:
            self._handles.append(model.register_forward_pre_hook(_BeforeForward(self)))
            # a batch may reach no compressed parameter on one rank, and some on another
            others = [param for param in model.parameters() if param.requires_grad and param not in self.slots]
            self._handles += [param.register_post_accumulate_grad_hook(self._queue_hook()) for param in others]

    def remove(self) -> None:
        """Take the hooks off; gradients are whole from the next backward on."""
        for handle in self._handles:
            handle.remove()
        _compressors.discard(self)
        self._take_back()

    @property
    def joined(self) -> bool:
        """Whether the model has run inside DistributedDataParallel, which now ignores its compressed parameters."""
        return self._group is not None

    def check_ranks(self) -> None:
        """Refuse to train several ranks apart."""
        if self._order and not self.joined and dist.get_world_size() > 1:
            raise RuntimeError(
                "several processes run, and the attached model was not called through DistributedDataParallel: wrap "
                "it, or where every rank trains a model of its own, set `optimizer.check_ranks = False`"
            )

    def bytes(self) -> int:
        """Bytes of the sums held now."""
        buffers = {id(buffer): buffer for slot in self.slots.values() if (buffer := slot.bucket.buffer())}
        flats = [flat for buffer in buffers.values() for flat in (buffer.flat, buffer.earlier) if flat is not None]
        return sum(flat.numel() * flat.element_size() for flat in flats)

    def most_bytes(self) -> int:
        """Bytes of the sums when every parameter has a gradient."""
        return 4 * sum(slot.entries for slot in self.slots.values())

    def _hook(self) -> Callable[[Tensor], None]:
        compressor = weakref.ref(self)  # hooks must not keep a dropped optimizer alive

        @_disable_dynamo  # a backward inside a compiled function would have it traced
        def compress(param: Tensor) -> None:
            owner = compressor()
            if owner is None or owner.slots[param].number is None:
                return
            if not isinstance(param.grad, CompressedGradient):
                _refuse_deepspeed(param)
                if owner._alone and _has_group():
                    raise RuntimeError("call optimizer.attach(model) after torch.distributed.init_process_group")
                gradient, param.grad = param.grad, None
                if gradient is not None:
                    owner.add(owner.slots[param], gradient)

        return compress

    def _queue_hook(self) -> Callable[[Tensor], None]:
        compressor = weakref.ref(self)

        @_disable_dynamo
        def queue(param: Tensor) -> None:
            owner = compressor()
            if owner is not None:
                owner._queue()

        return queue

    def follow(self) -> None:
        """Learn where every parameter is: groups come and go, and loading a checkpoint makes them anew."""
        places = {param: (number, group) for number, param, group in self._owner()._numbered()}
        for param, slot in self.slots.items():
            slot.number, self.groups[slot.key] = places.get(param, (None, slot.group))
            if slot.number is not None:
                self._check_sizes(slot)

    def _check_sizes(self, slot: Slot) -> None:
        """Raise RuntimeError if a parameter or its group is of other sizes than when it was attached."""
        layout = tensor_layout(slot.param.shape, slot.group)
        if layout is None or _shapes(layout, slot.group, slot.sample_every) != slot.shapes:
            raise RuntimeError(
                f"{self._owner()._name_of(slot.param)} or its group is of other sizes than when it was attached: call "
                "optimizer.attach(model) again"
            )

    # -- adding

    def add(self, slot: Slot, gradient: Tensor, *, early: bool = True) -> None:
        """Add a gradient of one parameter to what `param.grad` holds of it; `early`: it may yet be clipped."""
        self._owner()._check_gradient(slot.param, gradient)
        with shielded([slot.param]):
            self._add(slot, gradient, early)

    def _add(self, slot: Slot, gradient: Tensor, early: bool) -> None:
        buffer, held = slot.bucket.open(), slot.held
        if held is None:
            check_group(slot.group)  # it may have been written into, and `step` comes later
            self._check_sizes(slot)
            slot.clear(buffer)  # a dropped gradient may have left something
            held = slot.param.grad = CompressedGradient(slot, buffer)
            if not early:
                held.scale, held.prescale, held.early = torch.ones_like(held.scale), None, False
        elif held.scaled:
            self._fold(held)
        self._encode(slot, gradient, held)
        held.spent = held.zeroed = False
        self._unsummed, slot.bucket.sent = True, False
        if self._last and torch._C._current_graph_task_id() != -1:
            self._after_last(slot)

    def _fold(self, held: CompressedGradient) -> None:
        """Put the factor of a clipped or unscaled sum into it, before more is added."""
        optimizer, square = self._owner(), held.scale.square()
        group, factor = held.slot.group, held.scale
        for flat in (held.buffer.flat, held.buffer.earlier):
            if flat is not None:
                sums = held.slot.sums(flat)
                if RULES[group["moments"]].whitens and not held.slot.sample_every:
                    col = optimizer._state_of(held.slot.param, group)["col"]
                    used = sums.col / sums.number.clamp(min=1)
                    factor = held.scale * rewhitening(col, group["betas"][1], used, used * square)
                sums.p.mul_(factor)
                sums.sketch_norm_sq.mul_(factor.square())
                for squared in (sums.q, sums.row, sums.col, sums.norm_sq):
                    if squared is not None:
                        squared.mul_(square)
        held.scale, held.prescale, held.scaled = torch.ones_like(held.scale), None, False

    def _encode(self, slot: Slot, gradient: Tensor, held: CompressedGradient) -> None:
        optimizer, param, layout, group, sums = self._owner(), slot.param, slot.layout, slot.group, held.sums()
        factor = held.prescale  # only of sketches
        norm_sq = gradient_norm(gradient).square()
        sums.norm_sq.add_(norm_sq if factor is None else norm_sq * factor.square())
        sums.number.add_(1)
        grid, whitening = layout.grid(gradient), None
        if RULES[group["moments"]].whitens:
            state = optimizer._state_of(param, group)
            t = int(state["step"]) + 1
            for total, mean in zip((sums.row, sums.col), mean_squares(grid, layout), strict=True):
                total.add_(mean if factor is None else mean * factor.square())
        if slot.sample_every:
            value = gradient.reshape(-1)[held.first :: slot.sample_every].float()
            sums.p[: len(value)].add_(value)
            sums.sketch_norm_sq.add_(value.square().sum())
            return
        if RULES[group["moments"]].whitens:
            moved = {name: state[name].clone() for name in ("row", "col")}
            row, col = sums.row / sums.number, sums.col / sums.number
            whitening = whiten(moved, row, col, group["betas"][1], group["eps"], t)
        projection = optimizer._projection(group)
        assert projection is not None  # there is a sketch
        sparsity, squares = group["sparsity"], sums.q is not None
        p, q = encode(grid, layout, projection, sparsity, whitening, factor=factor, squares=squares)
        sums.sketch_norm_sq.add_(p.square().sum())
        sums.p.add_(p)
        if sums.q is not None and q is not None:
            sums.q.add_(q)

    def expect(self, slot: Slot, factor: Tensor) -> None:
        """Expect of the next step that clipping and unscaling multiply this group's gradients as far, too."""
        factor = factor.abs()
        last = torch.as_tensor(slot.group.get(FACTOR, 1.0), dtype=torch.float32, device=factor.device)
        slot.group[FACTOR] = torch.where(factor.isfinite() & (factor > 0), factor, last)

    def first(self, slot: Slot) -> int:
        """Give the first entry of a tensor whose gradient the next update holds."""
        if not slot.sample_every:
            return 0
        return slot.first(int(self._owner()._state_of(slot.param, slot.group)["step"]) + 1)

    # -- using

    def collect(self) -> None:
        """Make every gradient ready for a step: compressed, also where somebody has set a whole one, and summed."""
        self.follow()
        for param, slot in self.slots.items():
            if param.grad is not None and slot.held is None:
                gradient, param.grad = param.grad, None
                self.add(slot, gradient, early=False)
                # swapping a parameter's contents, as `model.to` may do, leaves its hooks idle until they are set again
                param._post_accumulate_grad_hooks = param._post_accumulate_grad_hooks
        self.finish()
        self._reduced_bytes, self._sent_bytes = self._sent_bytes, 0

    def stats(self) -> dict[str, float]:
        """Give what `SGC.stats` adds."""
        return {"reduced_bytes": float(self._reduced_bytes)} if self.world_size > 1 else {}

    # -- checkpoints in the middle of an accumulation

    def pending(self) -> dict[int, Tensor]:
        """Give what is held of the gradients that no step has used yet, by parameter number."""
        self.follow()
        self.finish()
        held = {slot.number: slot.held for slot in self.slots.values() if slot.number is not None}
        return {
            number: torch.cat([gradient.slot.part(gradient.buffer.flat), gradient.scale.reshape(1)])
            for number, gradient in held.items()
            if gradient is not None and not gradient.spent and not gradient.zeroed
        }

    @torch.no_grad()
    def restore(self, pending: Mapping[int, Tensor]) -> None:
        """Put the gradients of a checkpoint back."""
        self.follow()
        for slot in self.slots.values():
            slot.param.grad = None
            if slot.number is not None and slot.number in pending:
                saved = pending[slot.number].to(slot.param.device)
                buffer = slot.bucket.make()
                slot.part(buffer.flat).copy_(saved[:-1])
                buffer.reduced = bool(self._order)  # `pending` has summed it over the ranks
                held = CompressedGradient(slot, buffer)
                held.scale = saved[-1].clone()
                slot.param.grad = held

    # -- ranks

    def _leave_to_ddp_what_it_needs(self, model: nn.Module) -> None:
        """Tell DistributedDataParallel, which will wrap the model, which parameters to ignore."""
        trained = {param for param in model.parameters() if param.requires_grad}
        if trained <= self.slots.keys():  # it refuses to have nothing to do
            del self.slots[min(self.slots, key=lambda param: param.numel())]
        names = [name for name, param in model.named_parameters(remove_duplicate=False) if param in self.slots]
        names += [f"_orig_mod.{name}" for name in names]  # a compiled module's names
        before = getattr(model, "_ddp_params_and_buffers_to_ignore", None)
        ignored = _Ignored(before or (), names)
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        self._take_back = weakref.finalize(self, _unignore, weakref.ref(model), ignored, before)
        self._order = _buckets(list(self.slots.values()))

    def _before_forward(self) -> None:
        """Learn from DistributedDataParallel whether ranks sum after this micro-batch."""
        ddp = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
        if ddp is None or not torch.is_grad_enabled():
            return
        if ddp._join_config.enable:
            raise RuntimeError("compressed gradients need as many batches on every rank: leave out join")
        if self._group is None:
            self._join(ddp)
        self._last, self._callback_queued = ddp.require_backward_grad_sync, False
        for slot in self.slots.values():
            if slot.held is not None and slot.held.scaled:
                self._fold(slot.held)
        if self._last:
            self._unsummed = True
            for bucket in self._order:
                bucket.waiting, bucket.sent = {slot.key for slot in bucket.slots}, False

    def _join(self, ddp: nn.parallel.DistributedDataParallel) -> None:
        """Start as DistributedDataParallel does: every rank with the weights of its first."""
        optimizer = self._owner()
        synced = {param for name, param in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore}
        refusal = None
        if not synced.isdisjoint(self.slots):
            refusal = "optimizer.attach(model) needs the very module that DistributedDataParallel wraps"
        members = dist.get_process_group_ranks(ddp.process_group)
        optimizer._compare_ranks(members, refusal)
        # a group of its own: messages of DistributedDataParallel may come in another order on another rank
        timeout, some = ranks.timeout_of(ddp.process_group), len(members) < dist.get_world_size()
        # of some ranks torch makes the group by a name that counts groups, which must be as many on each of them
        self._group = dist.new_group(members, timeout=timeout, use_local_synchronization=some)
        self.world_size = len(members)
        for param in self.slots:
            dist.broadcast(param.detach(), members[0], group=self._group)

    def _after_last(self, slot: Slot) -> None:
        """Send what is complete while backward goes on, buckets in the same order on every rank."""
        slot.bucket.waiting.discard(slot.key)
        self._queue()
        for bucket in self._order:
            if bucket.waiting:
                break
            self._send(bucket)

    def _queue(self) -> None:
        """Have `_after_backward` called when the last backward ends."""
        if self._last and not self._callback_queued:
            self._callback_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    @_disable_dynamo
    def _after_backward(self) -> None:
        """Give every rank the same set of gradients, as their norm is taken over that set."""
        self._callback_queued = False
        for param, slot in self.slots.items():
            if param.grad is None:
                bucket = slot.bucket
                buffer = bucket.make() if bucket.sent else bucket.open()
                if not bucket.sent:
                    slot.clear(buffer)
                param.grad = CompressedGradient(slot, buffer)

    def _send(self, bucket: Bucket) -> None:
        """Start to sum a bucket over the ranks."""
        if bucket.sent:
            return
        bucket.sent, buffer = True, bucket.open()
        for slot in bucket.slots:
            if slot.held is None:
                slot.clear(buffer)
        self._sent_bytes += buffer.flat.numel() * buffer.flat.element_size()
        buffer.work = dist.all_reduce(buffer.flat, group=self._group, async_op=True)
        self._sending.append(buffer)  # until it is there; gradients may not hold it yet

    def finish(self) -> None:
        """Sum over the ranks what is not summed yet."""
        if self._group is None or not self._unsummed:
            return
        self._unsummed = False
        for bucket in self._order:
            self._send(bucket)
        for buffer in self._sending:
            buffer.wait()
        self._sending = []

    def _owner(self) -> SGC:
        optimizer = self._optimizer()
        assert optimizer is not None  # whoever calls holds it
        return optimizer


class _BeforeForward:
    """The hook on the model's forward; a copied or pickled model has none."""

    def __init__(self, compressor: Compressor | None = None) -> None:
        self._compressor = (lambda: None) if compressor is None else weakref.ref(compressor)
        # decorating the method would have `import sgc` import the compiler, which takes seconds
        self._run = None if compressor is None else torch.compiler.disable(Compressor._before_forward)

    def __call__(self, module: nn.Module, args: Any) -> None:
        owner = self._compressor()
        if owner is not None and self._run is not None:
            self._run(owner)

    def __reduce__(self) -> tuple[Any, ...]:
        return _BeforeForward, ()


class _Ignored(set[str]):
    """The names that DistributedDataParallel ignores; a copied or pickled model is told only those from before."""

    def __init__(self, before: Iterable[str], names: Iterable[str]) -> None:
        self._before = frozenset(before)
        super().__init__((*self._before, *names))

    def __deepcopy__(self, memo: dict[int, Any]) -> set[str]:
        return set(self._before)

    def __reduce__(self) -> tuple[Any, ...]:
        return set, (list(self._before),)


def _has_group() -> bool:
    """Whether there is a process group, be it of one rank: DistributedDataParallel works alike in all."""
    return dist.is_available() and dist.is_initialized()


def _unignore(model: Callable[[], nn.Module | None], ignored: set[str], before: Any) -> None:
    """Take back what DistributedDataParallel was told, unless somebody has told it something else since."""
    owner = model()
    if owner is None or getattr(owner, "_ddp_params_and_buffers_to_ignore", None) is not ignored:
        return
    del owner._ddp_params_and_buffers_to_ignore
    for name, param in owner.named_parameters():
        if name in ignored and hasattr(param, "_ddp_ignored"):
            del param._ddp_ignored
    if before is not None:
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(owner, before)


def _check_model(optimizer: SGC, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimizer.attach needs the model, a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise RuntimeError(
            "call optimizer.attach(model) before the model is wrapped in DistributedDataParallel, which has to be told "
            "which gradients to leave alone"
        )
    parameters = set(model.parameters())
    for number, param, _ in optimizer._numbered():
        _refuse_deepspeed(param)
        if param not in parameters:
            raise ValueError(f"{optimizer._parameter_name(number)} of this optimizer is not a parameter of the model")


def _refuse_deepspeed(param: Tensor) -> None:
    """DeepSpeed marks the parameters whose gradients it will take; without ZeRO-3 it does so after `attach`."""
    if hasattr(param, "ds_id") or hasattr(param, "_hp_mapping"):
        raise RuntimeError("DeepSpeed reduces and holds the gradients itself: use it without optimizer.attach(model)")


def _shapes(layout: Layout, group: Mapping[str, Any], sample_every: int) -> list[tuple[int, ...]]:
    """Give the shapes of what is summed of one tensor, as `Sums` names it; the last holds three numbers."""
    sketch: tuple[int, ...] = (layout.chunks, min(group["sketch_size"], layout.chunk))
    if not group["sketch_size"]:
        sketch = (math.ceil(layout.numel / sample_every),)
    row, col = (layout.rows, layout.cols) if RULES[group["moments"]].whitens else (0, 0)
    return [sketch, sketch if RULES[group["moments"]].square is not None else (0,), (row,), (col,), (3,)]


def _slots(compressor: Compressor, optimizer: SGC, sample_every: int) -> list[Slot]:
    """Make a slot for every parameter whose gradients can be compressed."""
    slots = []
    for number, param, group in optimizer._numbered():
        layout = tensor_layout(param.shape, group)
        if layout is None or not param.requires_grad:
            continue
        if not group["sketch_size"] and group["recovered"] is not None:
            raise ValueError(
                f"without a sketch, compressed gradients hold one entry in {sample_every}, and sparsity="
                f"{group['sparsity']} selects among all: set sketch_size, or leave sparsity out"
            )
        if has_basis(param.shape, group):
            raise ValueError(
                f"compressed gradients need a projection that does not depend on the data, got rank={group['rank']}; "
                "set rank=None"
            )
        if type(param.data) is not Tensor:
            optimizer._check_numbers(param, param)
            raise TypeError(
                f"compressed gradients need whole parameters, {optimizer._parameter_name(number)} is "
                f"{type(param.data).__name__}: sharded parameters have sharded gradients already"
            )
        slots.append(Slot(compressor, number, layout, group, sample_every))
    return slots


def _buckets(slots: list[Slot]) -> list[Bucket]:
    """Put the slots into buckets of one device, the last parameters first, as backward reaches them."""
    buckets: list[list[Slot]] = []
    for slot in reversed(slots):
        last = buckets[-1] if buckets else []
        fits = sum(other.entries for other in last) + slot.entries <= BUCKET_ENTRIES
        if last and fits and last[0].param.device == slot.param.device:
            last.append(slot)
        else:
            buckets.append([slot])
    return [Bucket(members) for members in buckets]

"""Compressed gradients: every gradient is compressed as soon as backward has made it, and freed. (ours)

`param.grad` of an attached parameter becomes a `CompressedGradient`. Where there is no sketch to hold a gradient in,
one entry in m is held, another at every step, so that each has its turn once in m steps and then moves √m times as far:
the update has the norm of a whole one. That is linear, and whitened when all is known: micro-batches and ranks make the
update of their batch, but for the estimate of R and C. `sgc.backward.sums` tells what is held where there is a sketch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from sgc.arguments import FACTOR, check_group
from sgc.backward.ddp import RankSums
from sgc.backward.gradient import CompressedGradient
from sgc.backward.sums import Slot, Sums, rewhitening, shapes_of
from sgc.checks import whole
from sgc.codec.encode import Whitening, encode
from sgc.codec.project import Projection
from sgc.gradients import check_gradient, check_numbers
from sgc.moments import RULES
from sgc.parallel.home import Given
from sgc.state import has_basis, tensor_layout
from sgc.surroundings import shielded
from sgc.whiten import gradient_norm, mean_squares, whiten

_compressors = weakref.WeakSet["Compressor"]()  # of all optimizers


class Optimizer(Protocol):
    """What compressing asks of an optimizer."""

    check_ranks: Any  # whether ranks are to agree, or the process group of those that are
    _given: Given

    def _numbered(self) -> Iterator[tuple[int, Tensor, dict[str, Any]]]: ...
    def _parameter_name(self, number: int) -> str: ...
    def _name_of(self, param: Tensor) -> str: ...
    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]: ...
    def _projection(self, group: Mapping[str, Any]) -> Projection | None: ...
    def _compare_ranks(self, ddp_ranks: list[int] | None = None, refusal: str | None = None) -> None: ...


class Compressor:
    """The hooks of one optimizer on one model, and the sums over micro-batches and ranks."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, sample_every: int) -> None:
        _check_model(optimizer, model)
        sample_every = whole("sample_every", sample_every, at_least=1)
        self._optimizer = weakref.ref(optimizer)
        self.params = {number: param for number, param, _ in optimizer._numbered()}  # by the keys of slots
        self.groups = {number: group for number, _, group in optimizer._numbered()}
        self.slots = {slot.param: slot for slot in _slots(self, optimizer, sample_every)}
        if not self.slots:
            raise ValueError("no gradient can be compressed: every trained tensor is smaller than its min_size")
        for other in list(_compressors):
            if not self.slots.keys().isdisjoint(other.slots):
                other.remove()  # of two optimizers the newer compresses
        _compressors.add(self)
        self._ranks = RankSums(self, model) if has_group() else None  # None: there is no process group
        self._handles = [param.register_post_accumulate_grad_hook(self._hook()) for param in self.slots]
        if self._ranks is not None:
            self._handles += self._ranks.handles(model)

    def remove(self) -> None:
        """Take the hooks off; gradients are whole from the next backward on."""
        for handle in self._handles:
            handle.remove()
        _compressors.discard(self)
        if self._ranks is not None:
            self._ranks.remove()

    @property
    def joined(self) -> bool:
        """Whether the model has run inside DistributedDataParallel, which now ignores its compressed parameters."""
        return self._ranks is not None and self._ranks.group is not None

    @property
    def world_size(self) -> int:
        """The ranks over which gradients are summed."""
        return 1 if self._ranks is None else self._ranks.world_size

    def compare_ranks(self, members: list[int], refusal: str | None) -> None:
        """Agree with these ranks on all that must be the same."""
        self._owner()._compare_ranks(members, refusal)

    def finish(self) -> None:
        """Sum over the ranks what is not summed yet."""
        if self._ranks is not None:
            self._ranks.finish()

    def bytes(self) -> int:
        """Count the bytes of the sums held now."""
        buffers = {id(buffer): buffer for slot in self.slots.values() if (buffer := slot.bucket.buffer())}
        flats = [flat for buffer in buffers.values() for flat in (buffer.flat, buffer.earlier) if flat is not None]
        return sum(flat.numel() * flat.element_size() for flat in flats)

    def most_bytes(self) -> int:
        """Count the bytes of the sums when every parameter has a gradient."""
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
                if owner._ranks is None and has_group():
                    raise RuntimeError("call optimizer.attach(model) after torch.distributed.init_process_group")
                gradient, param.grad = param.grad, None
                if gradient is not None:
                    owner.add(owner.slots[param], gradient)

        return compress

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
        if layout is None or shapes_of(layout, slot.group, slot.sample_every) != slot.shapes:
            raise RuntimeError(
                f"{self._owner()._name_of(slot.param)} or its group is of other sizes than when it was attached: call "
                "optimizer.attach(model) again"
            )

    # -- adding

    def add(self, slot: Slot, gradient: Tensor, *, early: bool = True) -> None:
        """Add a gradient of one parameter to what `param.grad` holds of it; `early`: it may yet be clipped."""
        check_gradient(slot.param, gradient, self._owner()._name_of)
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
            self.fold(held)
        self._encode(slot, gradient, held)
        held.spent = held.zeroed = False
        if self._ranks is not None:
            self._ranks.added(slot)

    def fold(self, held: CompressedGradient) -> None:
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
        """Add what is held of a gradient to the sums of its slot."""
        sums, factor, whitens = held.sums(), held.prescale, RULES[slot.group["moments"]].whitens
        scale = 1.0 if factor is None else factor.square()  # only sketches have a factor
        sums.norm_sq.add_(gradient_norm(gradient).square() * scale)
        sums.number.add_(1)
        grid = slot.layout.grid(gradient)
        if whitens:
            self._owner()._state_of(slot.param, slot.group)  # is made by the first gradient
            for total, mean in zip((sums.row, sums.col), mean_squares(grid, slot.layout), strict=True):
                total.add_(mean if factor is None else mean * scale)
        if slot.sample_every:
            value = gradient.reshape(-1)[held.first :: slot.sample_every].float()
            sums.p[: len(value)].add_(value)
            sums.sketch_norm_sq.add_(value.square().sum())
            return
        whitening, squares = self._whitening(slot, sums) if whitens else None, sums.q is not None
        projection = self._owner()._projection(slot.group)
        assert projection is not None  # there is a sketch
        sparsity = slot.group["sparsity"]
        p, q = encode(grid, slot.layout, projection, sparsity, whitening, factor=factor, squares=squares)
        sums.sketch_norm_sq.add_(p.square().sum())
        sums.p.add_(p)
        if sums.q is not None and q is not None:
            sums.q.add_(q)

    def _whitening(self, slot: Slot, sums: Sums) -> Whitening:
        """Whiten by R and C as the gradients so far would move them."""
        group, state = slot.group, self._owner()._state_of(slot.param, slot.group)
        moved = {name: state[name].clone() for name in ("row", "col")}
        row, col = sums.row / sums.number, sums.col / sums.number
        return whiten(moved, row, col, group["betas"][1], group["eps"], int(state["step"]) + 1)

    def expect(self, slot: Slot, factor: Tensor) -> None:
        """Expect of the next step that clipping and unscaling multiply this group's gradients as far, too."""
        factor = factor.abs()
        last = torch.as_tensor(slot.group.get(FACTOR, 1.0), dtype=torch.float32, device=factor.device)
        slot.group[FACTOR] = torch.where(factor.isfinite() & (factor > 0), factor, last)

    def first(self, slot: Slot) -> int:
        """Return the first entry of a tensor whose gradient the next update holds."""
        if not slot.sample_every:
            return 0
        return slot.first(int(self._owner()._state_of(slot.param, slot.group)["step"]) + 1)

    # -- using

    def collect(self) -> None:
        """Make every gradient ready for a step: compressed, also where somebody has set a whole one, and summed.

        Raises:
            RuntimeError: parameters have been replaced, or several ranks would train apart.
        """
        owner = self._owner()
        here = {param for _, param, _ in owner._numbered()}
        if not self.slots.keys() <= here and not all(id(param) in owner._given.ids for param in here):
            raise RuntimeError(
                "parameters were replaced after optimizer.attach(model), as FSDP does: compressed gradients need "
                "whole ones, and sharded parameters have sharded gradients already"
            )
        if self._ranks is not None and owner.check_ranks:
            self._ranks.check()
        self.follow()
        for param, slot in self.slots.items():
            if param.grad is not None and slot.held is None:
                gradient, param.grad = param.grad, None
                self.add(slot, gradient, early=False)
                # swapping a parameter's contents, as `model.to` may do, leaves its hooks idle until they are set again
                param._post_accumulate_grad_hooks = param._post_accumulate_grad_hooks
        self.finish()
        if self._ranks is not None:
            self._ranks.begin_step()

    def stats(self) -> dict[str, float]:
        """Return what `SGC.stats` adds."""
        return {} if self._ranks is None else self._ranks.stats()

    # -- checkpoints in the middle of an accumulation

    def pending(self) -> dict[int, Tensor]:
        """Return what is held of the gradients that no step has used yet, by parameter number."""
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
                buffer.reduced = self._ranks is not None  # `pending` has summed it over the ranks
                held = CompressedGradient(slot, buffer)
                held.scale = saved[-1].clone()
                slot.param.grad = held

    def _owner(self) -> Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None  # whoever calls holds it
        return optimizer


def has_group() -> bool:
    """Whether there is a process group, be it of one rank: DistributedDataParallel works alike in all."""
    return dist.is_available() and dist.is_initialized()


def _check_model(optimizer: Optimizer, model: nn.Module) -> None:
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


def _slots(compressor: Compressor, optimizer: Optimizer, sample_every: int) -> list[Slot]:
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
            check_numbers(param, param, optimizer._name_of)
            raise TypeError(
                f"compressed gradients need whole parameters, {optimizer._parameter_name(number)} is "
                f"{type(param.data).__name__}: sharded parameters have sharded gradients already"
            )
        slots.append(Slot(compressor, number, layout, group, sample_every))
    return slots

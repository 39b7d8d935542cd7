"""DistributedDataParallel leaves compressed gradients alone, and ranks sum them while backward goes on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from sgc.backward.gradient import CompressedGradient
from sgc.backward.sums import Bucket, Buffer, Slot, buckets_of
from sgc.parallel import ranks


class Owner(Protocol):
    """Who compresses the gradients."""

    slots: dict[Tensor, Slot]

    def fold(self, held: CompressedGradient) -> None:
        """Put the factor of a clipped or unscaled sum into it, before more is added."""

    def compare_ranks(self, members: list[int], refusal: str | None) -> None:
        """Agree with these ranks on all that must be the same."""


class RankSums:
    """The sums of one model's compressed gradients over the ranks of the DistributedDataParallel that will wrap it.

    Args:
        owner: who compresses; it holds this, and so is not held.
        model: the model.
    """

    def __init__(self, owner: Owner, model: nn.Module) -> None:
        self._owner_of: Callable[[], Owner | None] = weakref.ref(owner)
        self.world_size = 1
        self.group: Any = None  # of the ranks, known when the model runs; None: it has not run
        self._sent_bytes = self._reduced_bytes = 0  # to the ranks since the last step, and for it
        self._sending: list[Buffer] = []
        self._last = False  # whether ranks sum after the backward under way
        self._unsummed = False
        self._callback_queued = False
        self._take_back: Callable[[], Any] = self._leave_out(model)
        self._order = buckets_of(list(owner.slots.values()))

    def handles(self, model: nn.Module) -> list[Any]:
        """Set the hooks, and return their handles."""
        # a batch may reach no compressed parameter on one rank, and some on another
        others = [param for param in model.parameters() if param.requires_grad and param not in self._owner.slots]
        queues = [param.register_post_accumulate_grad_hook(self._queue_hook()) for param in others]
        return [model.register_forward_pre_hook(_BeforeForward(self)), *queues]

    def remove(self) -> None:
        """Take back what DistributedDataParallel was told to ignore."""
        self._take_back()

    def check(self) -> None:
        """Refuse to train several ranks apart."""
        if self.group is None and dist.get_world_size() > 1:
            raise RuntimeError(
                "several processes run, and the attached model was not called through DistributedDataParallel: wrap "
                "it, or where every rank trains a model of its own, set `optimizer.check_ranks = False`"
            )

    def stats(self) -> dict[str, float]:
        """Return what `SGC.stats` adds."""
        return {"reduced_bytes": float(self._reduced_bytes)} if self.world_size > 1 else {}

    def begin_step(self) -> None:
        """Count what was sent for this step."""
        self._reduced_bytes, self._sent_bytes = self._sent_bytes, 0

    def added(self, slot: Slot) -> None:
        """Note that something was added to a slot; send what is complete, buckets in the same order on every rank."""
        self._unsummed, slot.bucket.sent = True, False
        if not self._last or torch._C._current_graph_task_id() == -1:
            return
        slot.bucket.waiting.discard(slot.key)
        self._queue()
        for bucket in self._order:
            if bucket.waiting:
                break
            self._send(bucket)

    def finish(self) -> None:
        """Sum over the ranks what is not summed yet."""
        if self.group is None or not self._unsummed:
            return
        self._unsummed = False
        for bucket in self._order:
            self._send(bucket)
        for buffer in self._sending:
            buffer.wait()
        self._sending = []

    def before_forward(self) -> None:
        """Learn from DistributedDataParallel whether ranks sum after this micro-batch."""
        ddp = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
        if ddp is None or not torch.is_grad_enabled():
            return
        if ddp._join_config.enable:
            raise RuntimeError("compressed gradients need as many batches on every rank: leave out join")
        if self.group is None:
            self.join(ddp)
        self._last, self._callback_queued = ddp.require_backward_grad_sync, False
        for slot in self._owner.slots.values():
            if slot.held is not None and slot.held.scaled:
                self._owner.fold(slot.held)
        if self._last:
            self._unsummed = True
            for bucket in self._order:
                bucket.waiting, bucket.sent = {slot.key for slot in bucket.slots}, False

    def join(self, ddp: nn.parallel.DistributedDataParallel) -> None:
        """Start as DistributedDataParallel does: every rank with the weights of its first."""
        slots = self._owner.slots
        synced = {param for name, param in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore}
        refusal = None
        if not synced.isdisjoint(slots):
            refusal = "optimizer.attach(model) needs the very module that DistributedDataParallel wraps"
        members = dist.get_process_group_ranks(ddp.process_group)
        self._owner.compare_ranks(members, refusal)
        # a group of its own: messages of DistributedDataParallel may come in another order on another rank
        timeout, some = ranks.timeout_of(ddp.process_group), len(members) < dist.get_world_size()
        # of some ranks torch makes the group by a name that counts groups, which must be as many on each of them
        self.group = dist.new_group(members, timeout=timeout, use_local_synchronization=some)
        self.world_size = len(members)
        for param in slots:
            dist.broadcast(param.detach(), members[0], group=self.group)

    @property
    def _owner(self) -> Owner:
        owner = self._owner_of()
        assert owner is not None  # whoever calls holds it
        return owner

    def _leave_out(self, model: nn.Module) -> Callable[[], Any]:
        """Make DistributedDataParallel ignore the compressed parameters; return what takes that back."""
        slots = self._owner.slots
        trained = {param for param in model.parameters() if param.requires_grad}
        if trained <= slots.keys():  # it refuses to have nothing to do
            del slots[min(slots, key=lambda param: param.numel())]
        names = [name for name, param in model.named_parameters(remove_duplicate=False) if param in slots]
        names += [f"_orig_mod.{name}" for name in names]  # a compiled module's names
        before = getattr(model, "_ddp_params_and_buffers_to_ignore", None)
        ignored = _Ignored(before or (), names)
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        return weakref.finalize(self, _unignore, weakref.ref(model), ignored, before)

    def _queue_hook(self) -> Callable[[Tensor], None]:
        sums = weakref.ref(self)  # hooks must not keep a dropped optimizer alive

        @_disable_dynamo
        def queue(param: Tensor) -> None:
            own = sums()
            if own is not None:
                own._queue()

        return queue

    def _queue(self) -> None:
        """Queue `_after_backward` to be called when the last backward ends."""
        if self._last and not self._callback_queued:
            self._callback_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    @_disable_dynamo
    def _after_backward(self) -> None:
        """Make the set of gradients the same on every rank, as their norm is taken over that set."""
        self._callback_queued = False
        for param, slot in self._owner.slots.items():
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
        buffer.work = dist.all_reduce(buffer.flat, group=self.group, async_op=True)
        self._sending.append(buffer)  # until it is there; gradients may not hold it yet


class _BeforeForward:
    """The hook on the model's forward; a copied or pickled model has none."""

    def __init__(self, sums: RankSums | None = None) -> None:
        self._sums = (lambda: None) if sums is None else weakref.ref(sums)
        # decorating the method would have `import sgc` import the compiler, which takes seconds
        self._run = None if sums is None else torch.compiler.disable(RankSums.before_forward)

    def __call__(self, module: nn.Module, args: Any) -> None:
        own = self._sums()
        if own is not None and self._run is not None:
            self._run(own)

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

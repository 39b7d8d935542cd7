"""What several processes must agree on before they train one model, and how none of them waits for one that is gone.

Before its first update every rank writes what must agree into the store of the process group, compares it with what the
first rank to come has written, and waits for all: one verdict, on which all go on or all raise. From the making of its
optimizer to that verdict a rank shows signs of life, so that one that compiles or loads for long is waited for, as long
as the process group's own timeout allows, and one that has ended is not.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from sgc import backends
from sgc.arguments import IGNORED
from sgc.parallel import fsdp2

BEAT = 3.0  # seconds from one sign of life to the next
SILENCE = 30.0  # seconds without one after which a rank counts as ended; a call may keep the interpreter for long
FAREWELL = 5.0  # seconds that all have to read why they must raise, before rank 0 does and may take the store with it
AGREED = "agreed"
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_INSTEAD = (
    "where ranks train different models set `optimizer.check_ranks = False` before the first step, and where some of "
    "them train one, to their process group"
)


class Trainer(Protocol):
    """What the comparison of ranks reads of an optimizer."""

    check_ranks: Any  # a bool, or the process group of the ranks that train one model
    _compressor: Any  # None: not attached
    _given: Any  # `Given`: the tensors the optimizer was made with

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...  # noqa: D102

    @property
    def defaults(self) -> dict[str, Any]: ...  # noqa: D102

    @property
    def state(self) -> Mapping[Tensor, Any]: ...  # noqa: D102


def must_agree(optimizer: Trainer, ddp_ranks: Sequence[int] | None = None) -> dict[str, Any]:
    """List all that must be the same on every rank that trains the model.

    Args:
        optimizer: this rank's.
        ddp_ranks: of the DistributedDataParallel that sums compressed gradients; None: there is none.

    Returns:
        What JSON can hold; values that are equal here update equal weights by equal gradients equally.
    """
    compressor = optimizer._compressor
    return {
        "run": {
            "the version of sgc": sys.modules["sgc"].__version__,  # it imports this module
            "the version of torch": torch.__version__,
            backends.VARIABLE: backends.requested(),
            "attached": compressor is not None,
            "sample_every": compressor and max((slot.sample_every for slot in compressor.slots.values()), default=None),
            "the ranks of DistributedDataParallel": ddp_ranks and list(ddp_ranks),
        },
        "groups": [_described(optimizer, group) for group in optimizer.param_groups],
        "state": [_state_checksum(optimizer, group) for group in optimizer.param_groups],
    }


def _described(optimizer: Trainer, group: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a group: SGC's own arguments and its tensors, not what a sharding harness has put in their place."""
    names = group.get("param_names") or range(len(group["params"]))
    own = [
        [str(name), str(list(param.shape)), str(param.dtype), "trained" if param.requires_grad else "frozen"]
        for name, param in zip(names, group["params"], strict=False)
        if fsdp2.is_sharded(param) or _is_given(optimizer, param)
    ]
    described = {name: group[name] for name in optimizer.defaults if name in group and name not in IGNORED}
    return {**described, **({"steps": group["steps"]} if own else {}), "parameters": own}


def _is_given(optimizer: Trainer, param: Tensor) -> bool:
    """Whether it is a tensor the optimizer was made with, whole, and not what a sharding harness has put there."""
    return id(param) in optimizer._given.ids and not fsdp2.is_sharded(param) and not fsdp2.is_flattened(param)


def _state_checksum(optimizer: Trainer, group: Mapping[str, Any]) -> int:
    """Sum up what every rank must hold alike: the state of whole tensors, and not of shards and flat partitions."""
    alike = (optimizer.state[p] for p in group["params"] if p in optimizer.state and _is_given(optimizer, p))
    return checksum(value for held in alike for value in held.values() if isinstance(value, Tensor))


def checksum(tensors: Iterable[Tensor]) -> int:
    """Sum the bits of tensors as integers, which no order of summation, and so no device, changes.

    Args:
        tensors: of any shape, dtype and device.

    Returns:
        The sum; equal tensors have equal ones, and different ones hardly ever.
    """
    words = (tensor.detach().reshape(-1).view(WORDS[tensor.element_size()]) for tensor in tensors)
    return sum(int(word.sum(dtype=torch.int64)) for word in words)


def several() -> bool:
    """Whether there are other ranks, and a store to reach them by."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    return dist.get_backend() != "fake"  # whose other ranks are not there


def partners(optimizer: Trainer) -> list[int]:
    """List the ranks that train this optimizer's model: of the mesh that shards it, or those of the whole run."""
    if isinstance(optimizer.check_ranks, dist.ProcessGroup):
        return dist.get_process_group_ranks(optimizer.check_ranks)
    params = (param for group in optimizer.param_groups for param in group["params"])
    meshes = {param.device_mesh for param in params if fsdp2.is_sharded(param)}
    found = {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}
    return sorted(found) or list(range(dist.get_world_size()))


def timeout_of(group: dist.ProcessGroup | None = None) -> timedelta:
    """Look up the timeout that a process group was made with; None: the run's."""
    group = group or dist.distributed_c10d._get_default_group()
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    return getattr(options, "_timeout", dist.distributed_c10d.default_pg_timeout)


# ------------------------------------------------------------------------------------------------ the verdict


def agree(word: Mapping[str, Any], ranks: Sequence[int], refusal: str | None = None) -> None:
    """Compare what must agree with what the other ranks have, and wait for all of them.

    Args:
        word: of `must_agree`.
        ranks: who must agree, this rank among them.
        refusal: why this rank refuses by itself; None: it does not.

    Raises:
        RuntimeError: on every rank, with the same sentence: two differ, one refuses, or one has ended, or has not come
            within the process group's timeout.
    """
    try:
        verdict = _Meeting(ranks).hold(word, refusal)
    except dist.DistError as error:
        raise RuntimeError(f"the process that holds the store of the process group has ended: {error}") from error
    if verdict != AGREED:
        raise RuntimeError(verdict)


class _Meeting:
    """One comparison of some ranks, as each of them sees it."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.rank, self.ranks = dist.get_rank(), ranks
        self.store = dist.distributed_c10d._get_default_store()
        who = "all" if len(ranks) == dist.get_world_size() else ",".join(map(str, ranks))
        # the store counts, not this process: one that was started anew counts on where the others are
        self.key = f"sgc/{who}/{self.store.add(f'sgc/{who}/turn/{self.rank}', 1)}"
        self.seen: dict[int, tuple[int, float]] = {}
        self.readers = len(ranks)

    def hold(self, word: Mapping[str, Any], refusal: str | None) -> str:
        """Compare, and return the verdict: `AGREED`, or the sentence that all ranks raise."""
        mine = as_json(self.rank, word)
        first = json.loads(self.store.compare_set(f"{self.key}/word", "", json.dumps(mine)))
        if refusal is not None:
            self.decide(f"rank {self.rank} refuses to train: {refusal}")
        elif apart := difference(mine, first):
            self.decide(f"every rank must use the same SGC: {apart}; {_INSTEAD}")
        self.store.set(f"{self.key}/came/{self.rank}", "")
        if self.store.add(f"{self.key}/came", 1) == len(self.ranks):
            self.decide(AGREED)
        verdict = self.wait(watched=self.ranks if first["rank"] == self.rank else [first["rank"]])
        if verdict != AGREED:
            self.part()
        return verdict

    def part(self) -> None:
        """Wait, on rank 0, whose process holds the store unless a launcher does, until the others have read why."""
        with contextlib.suppress(dist.DistError):  # what is to be known is known
            self.store.add(f"{self.key}/read", 1)
            for _ in _pauses(FAREWELL if self.rank == 0 else 0):
                if self.store.add(f"{self.key}/read", 0) >= self.readers:
                    return

    def decide(self, verdict: str) -> None:
        """Write the verdict for all ranks, unless one is written already."""
        self.store.compare_set(f"{self.key}/verdict", "", verdict)

    def wait(self, watched: Sequence[int]) -> str:
        """Wait for the verdict; the first to come looks after all, and the others after that one."""
        looked, timeout = time.monotonic(), timeout_of()
        for _ in _pauses(timeout.total_seconds()):
            if self.store.check([f"{self.key}/verdict"]):
                break
            if time.monotonic() - looked > BEAT:
                looked = time.monotonic()
                for rank in watched:
                    if gone := self.gone(rank):
                        self.readers = self.store.add(f"{self.key}/came", 0)
                        self.decide(f"rank {rank} {gone}; {_INSTEAD}")
        else:
            missing = [rank for rank in self.ranks if not self.store.check([f"{self.key}/came/{rank}"])]
            late = ", ".join(map(str, missing))
            self.decide(
                f"rank {late} did not come to its first step within the process group's timeout of "
                f"{timeout.total_seconds():.0f} s; {_INSTEAD}"
            )
        return str(self.store.get(f"{self.key}/verdict").decode())

    def gone(self, rank: int) -> str | None:
        """Return how a rank has ended, or None while it shows signs of life."""
        if rank == self.rank:
            return None
        if self.store.check([f"sgc/ended/{rank}"]):
            return f"has ended before its first step: {self.store.get(f'sgc/ended/{rank}').decode()}"
        beats, now = self.store.add(f"sgc/alive/{rank}", 0), time.monotonic()
        if rank not in self.seen or self.seen[rank][0] != beats:
            self.seen[rank] = beats, now
        if now - self.seen[rank][1] < SILENCE:
            return None
        return f"has shown no sign of life for {SILENCE:.0f} s: it has ended, or hangs, or has made no SGC"


def _pauses(seconds: float) -> Iterator[None]:
    """Yield for so long, ever more slowly, and once at least: a store may have a thousand ranks to answer."""
    end, pause = time.monotonic() + seconds, 0.001
    while True:
        yield
        if time.monotonic() > end:
            return
        time.sleep(pause)  # a store's own wait would end with its timeout, and look after nobody meanwhile
        pause = min(2 * pause, 0.25)


def as_json(rank: int, word: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `must_agree` lists, as another rank reads it."""

    def plain(value: Any) -> Any:
        return value.item() if isinstance(value, Tensor) else str(value)

    found: dict[str, Any] = json.loads(json.dumps({"rank": rank, **word}, default=plain))
    return found


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Return where two ranks differ, each `as_json`, the lower rank first; None: nowhere."""
    low, high = sorted((one, other), key=lambda word: int(word["rank"]))
    here, there = f"on rank {low['rank']}", f"on rank {high['rank']}"
    for name, own in low["run"].items():
        if own != (theirs := high["run"].get(name)):
            return f"{name}={own} {here}, {name}={theirs} {there}"
    if len(low["groups"]) != len(high["groups"]):
        return f"{len(low['groups'])} parameter groups {here}, {len(high['groups'])} {there}"
    for number, (group, others) in enumerate(zip(low["groups"], high["groups"], strict=True)):
        where = f"(parameter group {number})"
        for name, own in group.items():
            if name != "parameters" and own != (theirs := others.get(name)):
                return f"{name}={own} {here}, {name}={theirs} {there} {where}"
        if len(group["parameters"]) != len(others["parameters"]):
            return f"{len(group['parameters'])} parameters {here}, {len(others['parameters'])} {there} {where}"
        for own, theirs in zip(group["parameters"], others["parameters"], strict=True):
            if own != theirs:
                return f"parameter {' '.join(own)} {here}, {' '.join(theirs)} {there} {where}"
    for number, (own, theirs) in enumerate(zip(low["state"], high["state"], strict=True)):
        if own != theirs:
            return f"the state {here} is not that {there} (parameter group {number}), as of another checkpoint"
    return None


# ------------------------------------------------------------------------------------------------ signs of life


class Presence:
    """Signs of life of this rank, from the making of an optimizer until the ranks have agreed or the optimizer goes."""

    def __init__(self, optimizer: object) -> None:
        self._over, self._pid = threading.Event(), os.getpid()
        self._rank, self._store = dist.get_rank(), dist.distributed_c10d._get_default_store()
        threading.Thread(target=_beat, args=(self._store, self._rank, self._over), daemon=True).start()
        atexit.register(self._last_words)
        weakref.finalize(optimizer, self.end).atexit = False

    def end(self) -> None:
        """Stop the signs of life."""
        self._over.set()
        atexit.unregister(self._last_words)

    def _last_words(self) -> None:
        """Write for the others, who may wait, why this process ends before its first step."""
        if os.getpid() != self._pid:
            return  # a fork of it
        self._over.set()
        error = getattr(sys, "last_value", None)
        with contextlib.suppress(dist.DistError):  # the store may have ended before
            self._store.set(f"sgc/ended/{self._rank}", f"{type(error).__name__}: {error}" if error else "no error")


def _beat(store: Any, rank: int, over: threading.Event) -> None:
    try:
        own = store.clone()  # a connection of its own: that of the rank may wait for something for long
        while not over.wait(BEAT):
            own.add(f"sgc/alive/{rank}", 1)
    except dist.DistError:
        return  # with the store all ranks end

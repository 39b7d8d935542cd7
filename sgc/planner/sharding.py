"""What one of several devices holds: the parts of weights, gradients and state that a strategy leaves to it.

Exact are the state of SGC (the rules of `sgc.sharded` and `sgc.zero`) and shards of weights, cut where the strategy
cuts them. Estimates are what a strategy holds for a moment: gathered layers, buckets and gradients on their way.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sgc.optimizer import SGC
from sgc.parallel.fsdp2 import local_schema
from sgc.parallel.pieces import Piece, piece_schema
from sgc.planner.models import PlanError, is_size
from sgc.planner.optimizers import FP32, Contender
from sgc.planner.trace import Held, Info
from sgc.state import schema_bytes, state_schema

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
MOST_DEVICES = 65_536  # whose shares are counted one by one
REDUCE_BUCKET = 500_000_000  # entries of the bucket in which ZeRO-2 collects gradients (DeepSpeed's default)


@dataclass(frozen=True)
class Devices:
    """So many devices that share the work by this strategy."""

    world_size: int
    strategy: str

    def __post_init__(self) -> None:
        if not (is_size(self.world_size) and self.world_size <= MOST_DEVICES):
            least = f"a whole number of at least 1 and at most {MOST_DEVICES}"
            raise PlanError(f"the world size must be {least}, got {self.world_size!r}")
        if self.strategy not in STRATEGIES:
            raise PlanError(f"the strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")

    @property
    def alone(self) -> bool:
        """Whether there is nothing to share."""
        return self.world_size == 1

    @property
    def shards(self) -> bool:
        """Whether optimizers see shards or partitions."""
        return not self.alone and self.strategy != "ddp"

    @property
    def flat(self) -> bool:
        """Whether optimizers see flat fp32 partitions, as under DeepSpeed."""
        return self.shards and self.strategy.startswith("zero")

    def share(self, info: Info) -> Info:
        """Return the largest shard of a tensor: the first rows."""
        if not info.shape:
            return info
        if self.strategy == "zero3":
            return replace(info, shape=(math.ceil(info.numel / self.world_size),))
        return replace(info, shape=(math.ceil(info.shape[0] / self.world_size), *info.shape[1:]))

    def state(self, contender: Contender, infos: Sequence[Info]) -> int:
        """Count the bytes of optimizer state on the device that holds most."""
        trained = [info for info in infos if info.trained]
        if not self.shards:
            return contender.held(trained)
        if contender.sgc is not None:
            group = SGC([torch.nn.Parameter(torch.empty(1))], **contender.sgc).param_groups[0]
            held = _partition_bytes if self.flat else _shard_bytes
            return held(trained, group, self.world_size) + contender.shared(trained)
        if self.flat:
            return contender.held([self._partition(trained)])
        return contender.held([self.share(info) for info in trained])

    def step(self, contender: Contender, infos: Sequence[Info]) -> int:
        """Count the bytes of temporaries, at most, while a step updates what this device has of the trained tensors."""
        if not self.shards:
            return contender.step(infos)
        if not self.flat:
            return contender.step([self.share(info) for info in infos])
        if contender.sgc is None:
            return contender.step([self._partition(infos)])
        pieces = [self._piece(info, infos) for info in infos]
        sketches = FP32 * _sketch_entries(infos, contender) // self.world_size  # made of all pieces before any moves
        squares = FP32 * max((piece.numel for piece in pieces), default=0)
        return max(squares, sketches + contender.step(pieces))

    def most_in_step(self, contender: Contender, infos: Sequence[Info]) -> int:
        """Return no less than `step` does, at no cost."""
        if self.shards or contender.sgc is None:
            return 1 << 62  # what it costs, others' closed forms, is little; parts of tensors are small
        return max(map(contender.most, infos), default=0)

    def _piece(self, info: Info, infos: Sequence[Info]) -> Info:
        """Return the most of a tensor that lies in one partition, in whole rows."""
        entries = math.ceil(info.numel / self.world_size)
        if self.strategy != "zero3":  # cut where memory says
            entries = min(info.numel, self._partition(infos).numel)
        cols = math.prod(info.shape[1:])
        return Info(info.name, (math.ceil(entries / cols), *info.shape[1:]) if info.shape else (), torch.float32)

    def _partition(self, infos: Sequence[Info]) -> Info:
        entries = math.ceil(sum(info.numel for info in infos) / self.world_size)
        return Info("partition", (entries,), torch.float32)

    def around(self, infos: Sequence[Info], compressed: Collection[str] = ()) -> tuple[float, int, Held]:
        """Work out how weights and gradients are shared.

        Args:
            infos: all parameters.
            compressed: the names of those whose gradients never pile up, which DDP leaves alone.

        Returns:
            The share of whole gradients that is held, bytes of weights held throughout, and what comes on top of every
            moment: gathered layers, buckets, DeepSpeed's fp32 weights and gradients.
        """
        trained = [info for info in infos if info.trained]
        whole = sum(info.bytes for info in infos)
        gradients = sum(info.bytes for info in trained)
        if self.alone:
            return 1.0, whole, Held()
        if self.strategy == "ddp":
            # its buckets: gradient_as_bucket_view is off by default
            return 1.0, whole, Held(gradients=sum(info.bytes for info in trained if info.name not in compressed))
        master = FP32 * self._partition(trained).numel
        if self.strategy == "zero1":
            return 1.0, whole, Held(weights=master, temporaries=master)
        if self.strategy == "zero2":
            bucket = min(REDUCE_BUCKET * infos[0].dtype.itemsize, gradients)
            return 1 / self.world_size, whole, Held(weights=master, gradients=bucket, temporaries=master)
        blocks, rest = _blocks(infos)
        gathered = rest + 2 * max(blocks, default=0)  # the one at work, and the next
        trained_blocks, trained_rest = _blocks(trained)
        arriving = max([trained_rest, *trained_blocks])
        shards = sum(self.share(info).bytes for info in infos)
        more = Held(weights=gathered, gradients=arriving)
        if self.strategy == "zero3":
            more = more.plus(weights=master, temporaries=master)
        return 1 / self.world_size, shards, more


def _blocks(infos: Sequence[Info]) -> tuple[list[int], int]:
    """Return the bytes of every repeated block, and of all that is in none."""
    blocks: dict[str, int] = {}
    rest = 0
    for info in infos:
        parts = info.name.split(".")
        at = next((at for at, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            rest += info.bytes
        else:
            key = ".".join(parts[: at + 1])
            blocks[key] = blocks.get(key, 0) + info.bytes
    return list(blocks.values()), rest


def _sketch_entries(infos: Sequence[Info], contender: Contender) -> int:
    group = SGC([torch.nn.Parameter(torch.empty(1))], **(contender.sgc or {})).param_groups[0]
    held = (state_schema(info.shape, group).get("sketch") for info in infos)
    return sum(math.prod(shape) for shape, _ in filter(None, held))


def _shard_bytes(infos: Sequence[Info], group: Any, world_size: int) -> int:
    """Count SGC's state of the first shard of every tensor, as under FSDP2."""
    total = 0
    for info in infos:
        rows = info.shape[0] if info.shape else 1
        total += schema_bytes(local_schema(info.shape, group, math.ceil(rows / world_size)))
    return total


def _partition_bytes(infos: Sequence[Info], group: Any, world_size: int) -> int:
    """Count SGC's state of the pieces in that flat partition which needs most."""
    size = math.ceil(sum(info.numel for info in infos) / world_size)
    held = [0] * world_size
    begin = 0
    for number, info in enumerate(infos):
        for rank in range(begin // size, math.ceil((begin + info.numel) / size)):
            start, stop = max(rank * size - begin, 0), min((rank + 1) * size - begin, info.numel)
            held[rank] += schema_bytes(piece_schema(Piece(number, info.shape, start, stop, 0), group))
        begin += info.numel
    return max(held)

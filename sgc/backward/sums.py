"""What is held of gradients in the place of them: sums over micro-batches, in buffers that ranks sum in one message.

With a sketch: let gᵢ be what a micro-batch on a rank added (times the c of the last step, since R and C are of clipped
and unscaled gradients), W the ranks, and c the factor that clipping and unscaling put on the sum afterwards, so the
gradient is g = (c/W)·Σgᵢ. Held are Σpᵢ, with pᵢ = A·top_s(gᵢ / √v̂ᵢ) and v̂ᵢ made of R, C and the mean of gᵢ² so far;
Σ‖gᵢ‖²; Σ‖pᵢ‖²; and the sums of the row and column means of gᵢ². The second moment needs (Σgᵢ)², which is larger than
Σgᵢ² by up to their number N where the gᵢ agree; ‖Σpᵢ‖²/Σ‖pᵢ‖² of each tensor estimates by how much.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sgc.codec.layout import Layout
from sgc.codec.project import mix
from sgc.moments import RULES

BUCKET_ENTRIES = 1 << 22  # fp32 numbers that ranks sum in one message (16 MiB)


class Keeper(Protocol):
    """Who holds the parameters of slots, and their groups, by the keys of slots."""

    params: dict[int, Tensor]
    groups: dict[int, dict[str, Any]]


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
        self, compressor: Keeper, number: int, layout: Layout, group: Mapping[str, Any], sample_every: int
    ) -> None:
        self._compressor = weakref.ref(compressor)
        self.key = number  # of the parameter, when it was attached
        self.number: int | None = number  # of the parameter now; None: its group has left the optimizer
        self.layout = layout
        self.sample_every = 0 if group["sketch_size"] else sample_every  # m; 0: a sketch is held
        self.shapes = shapes_of(layout, group, sample_every)
        self.entries = sum(map(math.prod, self.shapes))
        self.bucket = Bucket([self])
        self.start = 0

    def part(self, flat: Tensor) -> Tensor:
        """Return this tensor's part of a bucket's flat numbers."""
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
        """Return the first entry whose gradient is held for update t; it takes the turns of a cycle in random order."""
        cycle, turn = divmod(t - 1, self.sample_every)
        key = mix(mix(self.group["seed"] & 0xFFFFFFFF) ^ cycle)
        return sorted(range(self.sample_every), key=lambda entry: mix(key ^ (entry + 1)))[turn]

    @property
    def compressor(self) -> Any:
        """Who compresses its gradients, a `Compressor`."""
        compressor = self._compressor()
        if compressor is None:
            raise RuntimeError("the optimizer of this compressed gradient is gone: set param.grad to None")
        return compressor

    @property
    def param(self) -> Tensor:
        """The parameter."""
        param: Tensor = self.compressor.params[self.key]
        return param

    @property
    def group(self) -> dict[str, Any]:
        """The hyperparameters."""
        group: dict[str, Any] = self.compressor.groups[self.key]
        return group

    @property
    def held(self) -> Any:
        """The gradient, if it is compressed and of this slot; else None."""
        gradient = self.param.grad
        return gradient if getattr(gradient, "slot", None) is self else None


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
        """Return the buffer, if a gradient holds one."""
        return self._buffer()

    def make(self) -> Buffer:
        """Return the buffer, a new one if no gradient holds one."""
        buffer = self._buffer()
        if buffer is None:
            buffer = Buffer(self.entries, self.slots[0].param.device)
            self._buffer = weakref.ref(buffer)
        return buffer

    def open(self) -> Buffer:
        """Return the buffer, ready to take gradients."""
        buffer = self.make()
        buffer.reopen()
        return buffer


def agreement(sums: Sums) -> Tensor:
    """Estimate (Σgᵢ)² / Σgᵢ², at most N, by ‖Σpᵢ‖² / Σ‖pᵢ‖²; 1 for a single gradient."""
    share = sums.p.square().sum() / sums.sketch_norm_sq.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(sums.number > 1, torch.minimum(share, sums.number), 1.0)


def rewhitening(held: Tensor, beta2: float, used: Tensor, true: Tensor) -> Tensor:
    """Return √(mean v̂ as used ÷ mean v̂ as it should have been), from C and the column means of g² in both."""
    tiny = torch.finfo(torch.float32).tiny
    before = beta2 * held.mean()
    root_mean = [(before + (1 - beta2) * col.mean()).clamp(min=tiny).sqrt() for col in (used, true)]
    return root_mean[0] / root_mean[1]


def shapes_of(layout: Layout, group: Mapping[str, Any], sample_every: int) -> list[tuple[int, ...]]:
    """Return the shapes of what is summed of one tensor, as `Sums` names it; the last holds three numbers."""
    sketch: tuple[int, ...] = (layout.chunks, min(group["sketch_size"], layout.chunk))
    if not group["sketch_size"]:
        sketch = (math.ceil(layout.numel / sample_every),)
    row, col = (layout.rows, layout.cols) if RULES[group["moments"]].whitens else (0, 0)
    return [sketch, sketch if RULES[group["moments"]].square is not None else (0,), (row,), (col,), (3,)]


def buckets_of(slots: list[Slot]) -> list[Bucket]:
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

"""The plan itself: one row per optimizer, each with what a device holds at its peak."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sgc.planner import adapters, report
from sgc.planner.layers import trace_by_blocks
from sgc.planner.models import DTYPES, PlanError, check_run, load_config, make_model, parse_bytes
from sgc.planner.optimizers import FP32, Contender, compressor_entries, contender, hook_temporaries, specs
from sgc.planner.sharding import Devices
from sgc.planner.trace import Held, Info, Run, Trace, infos

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SKETCHES = (4, 8, 16, 24, 32, 48, 64, 128)  # of which the largest that fits is sought


@dataclass(frozen=True)
class Row:
    """What one device holds under one optimizer, in bytes."""

    optimizer: str
    spec: str
    state: int  # all that the optimizer ever holds, compressed gradients counted
    at_peak: Held | None  # None: not possible, see `note`
    fits: bool | None  # None: no budget was given
    estimated: bool = False  # whether more than the trace and closed forms is in it
    note: str = ""

    @property
    def peak(self) -> int | None:
        """Bytes of everything at the peak."""
        return None if self.at_peak is None else self.at_peak.total


@dataclass(frozen=True)
class Plan:
    """A planned training step: what it is of, and what each optimizer would need for it."""

    model: str
    architecture: str  # the class that is trained
    parameters: int
    dtype: str
    batch_size: int
    sequence_length: int
    gradient_checkpointing: bool
    loss: str
    world_size: int
    strategy: str
    budget: int | None  # bytes of a device
    reserve: int  # bytes of it kept for what is not tensors
    rows: tuple[Row, ...]
    unreached: int = 0  # parameters that no token reaches, as those of images
    named: bool = False  # whether the rows were named, and not left to the plan
    _seek: Callable[[str], int | None] = field(repr=False, compare=False, kw_only=True)

    @functools.cached_property
    def largest_sketch(self) -> int | None:
        """The k of the largest sketch that fits with whole gradients; sought when it is asked for."""
        return self._seek("sgc")

    @functools.cached_property
    def largest_compressed_sketch(self) -> int | None:
        """The k of the largest sketch that fits with compressed gradients; sought when it is asked for."""
        return self._seek("attached")

    @property
    def sketches(self) -> dict[str, int | None]:
        """What a table and JSON say of the largest sketches: nothing where rows were named, since it takes a while."""
        if self.named:
            return {}
        names = ("largest_sketch", "largest_compressed_sketch")
        return {name: getattr(self, name) for name in names}

    def table(self, color: bool = False) -> str:
        """Lay the plan out as a table; what fits is green if there is colour."""
        return report.table(self, color)

    def json(self) -> str:
        """Return the plan as JSON; all sizes are bytes."""
        held = {part.name: getattr(self, part.name) for part in fields(self) if part.repr}
        held["rows"] = [
            asdict(row) | {"at_peak": row.at_peak and row.at_peak._asdict(), "peak": row.peak} for row in self.rows
        ]
        return json.dumps(held | self.sketches, indent=2)

    def save_plot(self, path: str | Path) -> None:
        """Draw the rows as stacked bars with the budget as a line.

        Raises:
            ImportError: matplotlib is not there.
            PlanError: the path can't be written, or matplotlib draws no such file.
        """
        report.save_plot(self, path)


def plan(
    model: str | PathLike[str] | PretrainedConfig,
    *,
    gpu_memory: str | float | None = None,
    batch_size: int = 1,
    sequence_length: int | None = None,
    gradient_checkpointing: bool = False,
    dtype: str = "bf16",
    loss: str = "plain",
    world_size: int = 1,
    strategy: str = "ddp",
    reserve: str | float | None = None,
    lora_rank: int = 8,
    galore_rank: int = 128,
    apollo_rank: int = 256,
    optimizers: Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Plan what a training step of a model holds on one device, under each optimizer, without making a weight.

    Args:
        model: a built-in shape such as "llama-3-8b", a folder, a config.json, a name on the Hugging Face hub, or a
            configuration.
        gpu_memory: of a device, as "24GB" or "24GiB"; a number counts bytes; None: nothing is said about what fits.
        batch_size: rows on each device.
        sequence_length: tokens of a row; None: 2048, or all the positions that the model has.
        gradient_checkpointing: recompute the activations of every block in backward.
        dtype: of the weights, "bf16", "fp16" or "fp32".
        loss: "plain", as the model computes it, or "chunked", with torch's linear_cross_entropy (torch 2.13).
        world_size: devices.
        strategy: how they share, "ddp", "fsdp2", "zero1", "zero2" or "zero3".
        reserve: memory kept for the CUDA context, workspaces and fragmentation, as `gpu_memory` or 0; default 1 GB
            where memory is given.
        lora_rank: of LoRA and QLoRA.
        galore_rank: of GaLore.
        apollo_rank: of APOLLO.
        optimizers: specs of the rows wanted, as "attached(sample_every=34)" or "galore(rank=64)"; default: a choice.
        trust_remote_code: let the code run that a model brings along.

    Raises:
        PlanError: the model is not known, or the step not possible; one sentence that says why. It is a ValueError.

    Source: ours.
    """
    _check_words(dtype, loss, gradient_checkpointing=gradient_checkpointing, trust_remote_code=trust_remote_code)
    budget, kept = _memory(gpu_memory, reserve)
    if optimizers is not None and not (isinstance(optimizers, (list, tuple)) and optimizers):
        raise PlanError(f"the optimizers must be a list of at least one spec, got {optimizers!r}")
    devices = Devices(world_size, strategy)
    named = specs(DTYPES[dtype], lora_rank, galore_rank, apollo_rank) if optimizers is None else optimizers
    wanted = [contender(spec, DTYPES[dtype]) for spec in named]
    config = load_config(model, trust_remote_code=trust_remote_code)
    sequence_length = check_run(config, batch_size, sequence_length)
    chunked = loss == "chunked"
    run = Run(config, DTYPES[dtype], batch_size, sequence_length, gradient_checkpointing, chunked, trust_remote_code)
    planner = _Planner(run, devices)
    room = None if budget is None else budget - kept
    rows = tuple(planner.row(one, room) for one in wanted)
    return Plan(
        model=str(model) if isinstance(model, (str, PathLike)) else type(model).__name__,
        architecture=type(planner.meta).__name__,
        parameters=sum(info.numel for info in planner.params),
        dtype=dtype,
        batch_size=batch_size,
        sequence_length=sequence_length,
        gradient_checkpointing=gradient_checkpointing,
        loss=loss,
        world_size=world_size,
        strategy=strategy,
        budget=budget,
        reserve=kept,
        rows=rows,
        unreached=planner.trace(None).unreached,
        named=optimizers is not None,
        _seek=functools.partial(planner.largest, room=room),
    )


def _check_words(dtype: Any, loss: Any, **flags: Any) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise PlanError(f"{name} must be True or False, got {flag!r}")
    if dtype not in list(DTYPES):
        raise PlanError(f"the dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if loss not in ("plain", "chunked"):
        raise PlanError(f'the loss must be "plain" or "chunked", got {loss!r}')


def _memory(gpu_memory: str | float | None, reserve: str | float | None) -> tuple[int | None, int]:
    """Return the bytes of a device, or None, and those of them that are kept free."""
    budget = None if gpu_memory is None else parse_bytes(gpu_memory)
    kept = 10**9 if budget is not None else 0
    if reserve is not None:
        kept = parse_bytes(reserve, "the reserve", zero=True)
    if budget is not None and budget < kept:
        raise PlanError(f"memory must be at least the {kept:,} bytes kept free, got {gpu_memory!r}: {budget:,} bytes")
    return budget, kept


# what is held, what temporaries are held beside it at most, and what measures those
Moment = tuple[Held, int, Callable[[], int]]


class _Planner:
    """One traced step, and what every optimizer adds to it."""

    def __init__(self, run: Run, devices: Devices) -> None:
        self.run, self.devices = run, devices
        self._traces: dict[tuple[str, int] | None, Trace | PlanError] = {}
        with torch.device("meta"):
            self.meta = make_model(run.config, run.dtype, trust_remote_code=run.trust_remote_code)
        self.params = infos(self.meta)

    def row(self, one: Contender, room: int | None) -> Row:
        """Plan one optimizer; what it can't do with this model is a note."""
        impossible = functools.partial(Row, one.label, one.spec, 0, None, None if room is None else False)
        if self.devices.shards and not one.sharded:
            return impossible(note=f"not under {self.devices.strategy}")
        try:
            traced = self.trace(one.adapter)
        except PlanError as error:
            if one.adapter is None:
                raise
            return impossible(note=str(error))
        try:
            entries = {} if one.sgc is None else compressor_entries(self.meta, one)
        except PlanError:
            raise
        except ValueError as error:  # every tensor is so small that its gradient is kept whole
            return impossible(note=str(error))
        state = self.devices.state(one, traced.params)
        peak = self.peak(one, traced, state, entries)
        fits = None if room is None else peak.total <= room
        held = state + FP32 * sum(entries.values())
        return Row(one.label, one.spec, held, peak, fits, estimated=not self.devices.alone)

    def trace(self, adapter: tuple[str, int] | None) -> Trace:
        """Trace forward and backward once for each kind of problem.

        Raises:
            PlanError: the model refuses the step.
        """
        if adapter not in self._traces:
            adapt = None
            if adapter is not None:
                put = {"lora": adapters.lora, "qlora": adapters.qlora}[adapter[0]]
                adapt = functools.partial(put, rank=adapter[1])
            try:
                self._traces[adapter] = trace_by_blocks(self.run, self.meta, adapt)
            except PlanError as error:
                self._traces[adapter] = error
        found = self._traces[adapter]
        if isinstance(found, PlanError):
            raise found
        return found

    def peak(self, one: Contender, traced: Trace, state: int, entries: Mapping[str, int]) -> Held:
        """Find what is held at the moment of most bytes; what can't be that moment is not measured."""
        peak = Held()
        for held, most, measure in self.moments(one, traced, state, entries):
            if held.total + most > peak.total:
                found = held.plus(temporaries=measure()) if most else held
                peak = max(peak, found, key=lambda held: held.total)
        return peak

    def moments(self, one: Contender, traced: Trace, state: int, entries: Mapping[str, int]) -> Iterator[Moment]:
        """Yield what is held at every moment of backward in which it may be most, and in the step.

        With each, what temporaries it has at most beside these, and what measures them.
        """
        share, weights, more = self.devices.around(traced.params, entries)
        buffers = traced.moments[0].weights - sum(info.bytes for info in traced.params)
        weights += buffers
        trained = [info for info in traced.params if info.trained]

        def on_device(held: Held) -> Held:
            found = Held(weights, round(share * held.gradients), state, held.activations, held.temporaries)
            return found.plus(**more._replace(temporaries=0)._asdict()) if any(more) else found

        if one.attach is None:
            yield from ((on_device(held), 0, _nothing) for held in traced.moments)
        else:
            for held, most, measure in _compressed(traced, entries, one):
                yield on_device(held), most, measure
        left = sum(info.bytes for info in trained if info.name not in entries) + FP32 * sum(entries.values())
        at_step = on_device(Held(gradients=left, temporaries=more.temporaries))
        yield at_step, self.devices.most_in_step(one, trained), functools.partial(self.devices.step, one, trained)

    def largest(self, kind: str, room: int | None) -> int | None:
        """Find the k of the largest sketch that fits, with whole gradients ("sgc") or "attached" ones."""
        if room is None:
            return None
        low, high = -1, len(SKETCHES)  # fits, and does not
        while high - low > 1:
            middle = (low + high) // 2
            if self.row(contender(f"{kind}(sketch_size={SKETCHES[middle]})", self.run.dtype), room).fits:
                low = middle
            else:
                high = middle
        return SKETCHES[low] if low >= 0 else None


def _nothing() -> int:
    return 0


def _compressed(traced: Trace, entries: Mapping[str, int], one: Contender) -> Iterator[Moment]:
    """Yield what is held where gradients are freed as soon as they are there, and `entries` numbers kept of each."""
    params = {info.name: info for info in traced.params}
    arriving = {at: name for name, at in traced.arrivals.items() if name in entries}
    freed = kept = 0
    for at, held in enumerate(traced.moments):
        yield held.plus(gradients=kept - freed), 0, _nothing
        if at in arriving:
            name = arriving[at]
            kept += FP32 * entries[name]
            hook = functools.partial(hook_temporaries, params[name], one)
            yield held.plus(gradients=kept - freed), one.most(params[name]), hook
            freed += params[name].bytes


__all__ = ["Info", "Plan", "PlanError", "Row", "plan"]

"""The optimizers of a plan: the bytes of state each holds for a tensor, and what its step needs for a moment."""

from __future__ import annotations

import ast
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sgc.optimizer import SGC
from sgc.planner.measure import attached_temporaries, most_temporaries, step_temporaries
from sgc.planner.models import DTYPES, PlanError, is_size
from sgc.planner.trace import Info
from sgc.state import projection_bytes, schema_bytes, state_schema

FP32 = 4


@dataclass(frozen=True)
class Contender:
    """One optimizer as a plan sees it."""

    spec: str
    label: str
    state: Callable[[Info], int]  # bytes held for a tensor, whole or a shard
    step: Callable[[Sequence[Info]], int]  # bytes of temporaries, at most, while a step updates these
    shared: Callable[[Sequence[Info]], int] = lambda infos: 0  # bytes held for all tensors together
    adapter: tuple[str, int] | None = None  # "lora" or "qlora", and its rank
    sgc: dict[str, Any] | None = None  # arguments of SGC
    attach: dict[str, int] | None = None  # arguments of SGC.attach
    sharded: bool = True  # whether it runs on shards and on flat partitions
    most: Callable[[Info], int] = lambda info: 1 << 62  # no less than what hook or step hold for a tensor

    def held(self, infos: Sequence[Info]) -> int:
        """Count the state of all trained tensors."""
        trained = [info for info in infos if info.trained]
        return sum(map(self.state, trained)) + self.shared(trained)


def specs(dtype: torch.dtype, lora_rank: int, galore_rank: int, apollo_rank: int) -> list[str]:
    """List what a plan compares, as `contender` takes it."""
    found = ["sgc", *(f"sgc(sketch_size={k})" for k in (8, 32, 64))]
    found += [*(f"attached(sample_every={m})" for m in (8, 32, 64)), *(f"attached(sketch_size={k})" for k in (8, 32))]
    found += ["adamw_fused"] if dtype is torch.float32 else ["adamw_fused(state=fp32)", "adamw_fused"]
    found += ["adamw8bit", "adafactor", f"galore(rank={galore_rank})", f"apollo(rank={apollo_rank})"]
    return [*found, f"lora(rank={lora_rank})", f"qlora(rank={lora_rank})", "sgd"]


def contender(spec: str, dtype: torch.dtype) -> Contender:
    """Make a contender of a spec such as "galore(rank=128)"; weights are of this dtype.

    Raises:
        PlanError: there is no such optimizer, or it does not take what the spec gives it.
    """
    makers: dict[str, Callable[..., Contender]] = {
        "sgc": sgc,
        "attached": attached,
        "adamw_fused": lambda state=None: adamw(dtype if state is None else _dtype(state)),
        "adamw8bit": lambda: ADAMW_8BIT,
        "adafactor": lambda: ADAFACTOR,
        "galore": lambda rank=128: galore(_rank(rank)),
        "apollo": lambda rank=256: apollo(_rank(rank)),
        "lora": lambda rank=8: adapters("lora", _rank(rank)),
        "qlora": lambda rank=8: adapters("qlora", _rank(rank)),
        "sgd": lambda: SGD,
    }
    name, given = _parsed(spec)
    if name not in makers:
        raise PlanError(f"an optimizer must be one of {', '.join(makers)}, got {spec!r}")
    known = list(inspect.signature(makers[name]).parameters)
    if name in ("sgc", "attached"):
        known = [*known[:-1], *SGC_ARGUMENTS]
    for word in given:
        if word not in known:
            raise PlanError(f"{name} takes {', '.join(known) if known else 'no arguments'}, got {word} in {spec!r}")
    try:
        return replace(makers[name](**given), spec=spec)
    except (ValueError, TypeError, OverflowError, ImportError) as error:  # what SGC says of its arguments
        raise PlanError(f"{error}, in {spec!r}") from error


def _parsed(spec: str) -> tuple[str, dict[str, Any]]:
    """Take "name" or "name(word=value, …)" apart; a value is a literal, or a word without quotes."""
    try:
        call = ast.parse(spec.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            return call.id, {}
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            words = [str(pair.arg) for pair in call.keywords]  # of ** it is None, which no optimizer takes
            if len(set(words)) == len(words):
                return call.func.id, dict(zip(words, map(_value, call.keywords), strict=True))
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError, MemoryError):
        pass  # what ast raises of words that are no Python
    raise PlanError(f"an optimizer must be a name, or name(word=value, …) with every word once, got {spec!r}")


def _value(pair: ast.keyword) -> Any:
    if isinstance(pair.value, ast.Name):
        return pair.value.id
    found = ast.literal_eval(pair.value)
    found = tuple(found) if isinstance(found, list) else found
    if not all(isinstance(one, (str, int, float)) or one is None for one in _each(found)):
        raise ValueError("a value must be a number, a word or some of them")
    return found


def _each(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


def _dtype(word: Any) -> torch.dtype:
    if word not in DTYPES:
        raise PlanError(f"the state must be one of {', '.join(DTYPES)}, got {word!r}")
    return DTYPES[word]


def _rank(rank: Any) -> int:
    if not is_size(rank):
        raise PlanError(f"the rank must be a whole number of at least 1, got {rank!r}")
    return int(rank)


# ---- SGC -------------------------------------------------------------------------------------------------------------


SGC_ARGUMENTS = list(inspect.signature(SGC).parameters)[1:]  # all but the parameters


def sgc(**kwargs: Any) -> Contender:
    """SGC with whole gradients."""
    words = ", ".join(f"{name}={value}" for name, value in kwargs.items())
    group = SGC([nn.Parameter(torch.empty(1))], **kwargs).param_groups[0]
    options = tuple(sorted(kwargs.items()))

    def state(info: Info) -> int:
        return schema_bytes(state_schema(info.shape, group))

    def shared(infos: Sequence[Info]) -> int:
        return projection_bytes([info.shape for info in infos], group)

    def step(infos: Sequence[Info]) -> int:
        return max((step_temporaries(info, options) for info in _largest(infos)), default=0)

    label, most = f"SGC({words})", functools.partial(most_temporaries, group=group, every=0)
    return Contender(f"sgc({words})" if words else "sgc", label, state, step, shared, sgc=kwargs, most=most)


def attached(sample_every: int | None = None, **kwargs: Any) -> Contender:
    """SGC with compressed gradients."""
    whole = sgc(**kwargs)
    if kwargs.get("sketch_size"):
        if sample_every is not None:
            raise PlanError("sample_every is for gradients without a sketch: leave it out, or sketch_size")
        attach = {}
    else:
        attach = {"sample_every": 8 if sample_every is None else sample_every}
    any_layer = nn.Linear(4096, 4096, bias=False, device="meta")
    SGC(any_layer.parameters(), **{**kwargs, "min_size": 0}).attach(any_layer, **attach).detach()  # its own checks
    every = attach.get("sample_every", 8)
    words = ", ".join(f"{name}={value}" for name, value in {**kwargs, **attach}.items())
    options = tuple(sorted(kwargs.items()))

    def step(infos: Sequence[Info]) -> int:
        return max((attached_temporaries(info, options, every)[1] for info in _largest(infos)), default=0)

    label = f"{whole.label} attached" + (f", sample_every={every}" if attach else "")
    group = SGC([nn.Parameter(torch.empty(1))], **kwargs).param_groups[0]
    most = functools.partial(most_temporaries, group=group, every=every)
    return replace(whole, spec=f"attached({words})", label=label, step=step, attach=attach, sharded=False, most=most)


def hook_temporaries(info: Info, contender: Contender) -> int:
    """Find what the hook holds while it compresses the gradient of a tensor."""
    assert contender.sgc is not None  # asked of SGC alone
    options, every = tuple(sorted(contender.sgc.items())), (contender.attach or {}).get("sample_every", 8)
    return attached_temporaries(info, options, every)[0]


def compressor_entries(model: nn.Module, contender: Contender) -> dict[str, int]:
    """Return the fp32 numbers held of each compressed gradient, by name; `model` is on the meta device.

    Raises:
        PlanError: SGC refuses the model's parameters, as where `rank` is larger than one of their sides.
        ValueError: no gradient can be compressed.
    """
    assert contender.sgc is not None  # asked of SGC alone
    try:
        optimizer = SGC(model.named_parameters(), **contender.sgc)
    except (ValueError, TypeError) as error:
        raise PlanError(f"{error}, in {contender.spec!r}") from error
    if contender.attach is None:
        return {}
    optimizer.attach(model, **contender.attach)
    names: dict[torch.Tensor, str] = {param: name for name, param in model.named_parameters()}
    assert optimizer._compressor is not None  # attached
    entries = {names[param]: slot.entries for param, slot in optimizer._compressor.slots.items()}
    optimizer.detach()
    return entries


def _largest(infos: Sequence[Info]) -> list[Info]:
    """Keep the largest tensor: the others need less."""
    return sorted(infos, key=lambda info: -info.numel)[:1]


# ---- the others: what their packages hold, read from their source and tested against them ----------------------------


def adamw(dtype: torch.dtype) -> Contender:
    """torch.optim.AdamW(fused=True), with moments in this dtype; its step works in place."""

    def state(info: Info) -> int:
        return 2 * info.numel * dtype.itemsize + FP32  # and "step"

    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return Contender(f"adamw_fused(state={short})", f"AdamW, {short} state", state, lambda infos: 0)


def _adamw_8bit_state(info: Info) -> int:
    if info.numel < 4096:
        return 2 * FP32 * info.numel
    return 2 * (info.numel + FP32 * math.ceil(info.numel / 256))


def _quantization_maps(infos: Sequence[Info]) -> int:
    return 2 * FP32 * 256 if any(info.numel >= 4096 for info in infos) else 0


# bitsandbytes 0.50: a byte and a fp32 scale per 256 entries, for each of two moments; small tensors in fp32.
ADAMW_8BIT = Contender("adamw8bit", "8-bit AdamW", _adamw_8bit_state, lambda infos: 0, _quantization_maps)


def _adafactor_state(info: Info) -> int:
    shape = info.shape
    factored = math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1] if len(shape) > 1 else info.numel
    return FP32 * (factored + 1)  # and the RMS of the weight


def _adafactor_step(infos: Sequence[Info]) -> int:
    most = 0
    for info in infos:
        # fp32: the update and one more; of 16-bit weights also the gradient's and the weight's copies
        held = info.numel * FP32 * (2 if info.dtype is torch.float32 else 4)
        most = max(most, held + (_adafactor_state(info) if len(info.shape) > 1 else 0))  # and its factors' roots
    return most


# transformers' Adafactor without first moment.
ADAFACTOR = Contender("adafactor", "Adafactor", _adafactor_state, _adafactor_step)


def _dense_adam(info: Info) -> int:
    return 2 * info.numel * info.dtype.itemsize


def _is_lowrank(info: Info, rank: int) -> bool:
    return info.repeated and min(info.shape) > rank


def galore(rank: int) -> Contender:
    """galore-torch 1.0: rank-r moments and projector for the matrices of repeated layers, dense Adam for the rest."""

    def state(info: Info) -> int:
        if not _is_lowrank(info, rank):
            return _dense_adam(info)
        small, large = sorted(info.shape)
        moments = 2 * rank * large * info.dtype.itemsize
        if info.dtype is torch.float32:  # its projector is a view that keeps the whole U or Vᵀ of the SVD alive
            return moments + FP32 * small * small
        return moments + rank * small * info.dtype.itemsize

    def step(infos: Sequence[Info]) -> int:
        most = 0
        for info in infos:
            size = info.dtype.itemsize
            update = 2 * info.numel * size
            if _is_lowrank(info, rank):
                small, large = sorted(info.shape)
                update += 3 * rank * large * size  # gradient, denominator and update in the subspace
                if info.dtype is not torch.float32:  # the SVD at a refresh, of a copy in fp32, and its factors
                    svd = 2 * info.numel + small * small + small + rank * large
                    update = max(update, FP32 * svd + rank * small * size)
            most = max(most, update)
        return most

    return Contender(f"galore(rank={rank})", f"GaLore, rank {rank}", state, step, sharded=False)


def apollo(rank: int) -> Contender:
    """apollo-torch 1.0: as GaLore, with a random projector; the update is the scaled gradient."""

    def state(info: Info) -> int:
        if not _is_lowrank(info, rank):
            return _dense_adam(info)
        small, large = sorted(info.shape)
        return (2 * rank * large + rank * small + 1) * info.dtype.itemsize  # and a norm

    def step(infos: Sequence[Info]) -> int:
        most = 0
        for info in infos:
            entries = 2 * info.numel
            if _is_lowrank(info, rank):
                entries += (3 * rank + 1) * max(info.shape) + 1  # as GaLore's, and a scale for every channel
            most = max(most, entries * info.dtype.itemsize)
        return most

    return Contender(f"apollo(rank={rank})", f"APOLLO, rank {rank}", state, step, sharded=False)


def adapters(kind: str, rank: int) -> Contender:
    """LoRA or QLoRA: fused AdamW on adapters in fp32."""
    label = {"lora": "LoRA", "qlora": "QLoRA"}[kind]
    plain = adamw(torch.float32)
    return replace(plain, spec=f"{kind}(rank={rank})", label=f"{label}, rank {rank}", adapter=(kind, rank))


SGD = Contender("sgd", "SGD, no momentum", lambda info: 0, lambda infos: 0)

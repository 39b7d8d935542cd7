"""SGC in Hugging Face's Trainer: groups of parameters from a model's names, and a callback that reports."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import json
import logging
import math
import os
import re
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgc.backward.gradient import CompressedGradient
from sgc.checks import flag, shown, whole, word
from sgc.codec.project import Projection
from sgc.codec.recover import pursue
from sgc.optimizer import SGC
from sgc.probes import PROBE_EVERY
from sgc.state import tensor_layout

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler
except ImportError as error:
    raise ImportError('sgc.hf needs transformers: pip install "sgc[hf]"') from error

POLICIES = ("compressed", "dense", "frozen")
DENSE = 1 << 62  # a min_size that no tensor reaches
OPTIONS = [name for name in inspect.signature(SGC).parameters if name != "params"]
DENSE_OPTIONS = ("lr", "betas", "eps", "weight_decay", "stochastic_rounding", "maximize", "seed")  # all that AdamW has
COMPONENTS = {  # of the state, by the names of its tensors
    "sketches": ("sketch", "sketch_absmax", "sketch_sq", "sketch_sq_absmax", "square_sketch", "square_sketch_absmax"),
    "row_and_column_means": ("row", "col"),
    "bases": ("basis",),
    "dense_moments": ("exp_avg", "exp_avg_sq"),
    "step_counters": ("step", "span"),
}
FAILED_PROBES = 5  # in a row, before recovery is said to fail
NOISE_SHARE = 0.93  # of what noise leaves: runs that learned stayed below 0.9 of it, those that did not above 0.95
WRAPPER = re.compile(r"(?:^module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # in names
_logger = logging.getLogger("sgc")

Override = Mapping[str, Any] | str


def create_sgc_optimizer(
    model: nn.Module,
    *,
    embeddings: str = "compressed",
    overrides: Mapping[str, Override] | None = None,
    compressed_gradients: bool = False,
    sample_every: int | None = None,
    **sgc_kwargs: Any,
) -> SGC:
    """Make SGC for a model: biases and norms do not decay, frozen parameters are left out, tied ones taken once.

    Args:
        model: as it will be trained, before DDP or FSDP wraps it.
        embeddings: what becomes of embeddings and of the head that predicts tokens: "compressed", "dense" (AdamW in
            fp32) or "frozen" (their `requires_grad` is switched off).
        overrides: by module, what differs there: SGC's keyword arguments, or one of the words of `embeddings`. A key is
            a name ("lm_head", "model.layers.0"), or the last parts of one ("q_proj": in every layer); * stands for any
            part or piece of one. It holds for all parameters below, and where keys meet, the longest match wins; what
            is frozen stays so unless a longer match says "compressed" or "dense".
        compressed_gradients: compress every gradient as soon as backward has made it (`SGC.attach`).
        sample_every: as for `SGC.attach`; default: its own.
        sgc_kwargs: of SGC, for all: lr, betas, weight_decay, sketch_size, …; a function that is called by hand knows no
            Trainer, so what is left out is SGC's own default.

    Returns:
        The optimizer; its groups hold the names of their parameters. Parameters without an override come first, those
        that decay before those that do not.

    Raises:
        ValueError: an override that names nothing, or nothing that is trained; no parameter is trained; a value out of
            range.
        TypeError: a value of another kind.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(512, 64), nn.Linear(64, 512))
        >>> optimizer = create_sgc_optimizer(model, lr=1e-3, embeddings="dense", overrides={"1": dict(sketch_size=32)})
        >>> [group["param_names"] for group in optimizer.param_groups]
        [['0.weight'], ['1.weight'], ['1.bias']]
    """
    compressed_gradients = flag("compressed_gradients", compressed_gradients)
    sample_every = whole("sample_every", sample_every, at_least=1, optional=True)
    if sample_every is not None and not compressed_gradients:
        raise ValueError(
            f"sample_every={sample_every} says how gradients are compressed: set compressed_gradients=True"
        )
    if compressed_gradients and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        raise ValueError("compressed_gradients is not for FSDP, which shards parameters and gradients already")
    groups, frozen = parameter_groups(model, embeddings=embeddings, overrides=overrides)
    optimizer = SGC(groups, **sgc_kwargs)
    for param in frozen:
        param.requires_grad_(False)
    if compressed_gradients:
        optimizer.attach(model, **({} if sample_every is None else {"sample_every": sample_every}))
    return optimizer


class SGCFactory:
    """Make SGC inside a Trainer, which calls `SGCFactory()(model, **kwargs)`: see `create_sgc_optimizer`.

    Without `lr`, learning rate and weight decay are those of the Trainer's arguments, if `SGCCallback` is one of its
    callbacks. A Trainer that takes no `optimizer_cls_and_kwargs`, as some of TRL's, can be given it afterwards.

    Example:
        >>> from transformers import Trainer
        >>> trainer = Trainer(..., optimizer_cls_and_kwargs=(SGCFactory, {"lr": 1e-3}))  # doctest: +SKIP
        >>> trainer.optimizer_cls_and_kwargs = (SGCFactory, {"lr": 1e-3})  # doctest: +SKIP
    """

    def __call__(self, model: nn.Module, **kwargs: Any) -> SGC:
        """Make the optimizer of a model from the keyword arguments of `create_sgc_optimizer`.

        Raises:
            ValueError: as `create_sgc_optimizer`; or there is no `lr`, and no Trainer with `SGCCallback` to take it of.
        """
        return create_sgc_optimizer(model, **(kwargs if "lr" in kwargs else _rates_of_trainer() | kwargs))


def _rates_of_trainer() -> dict[str, float]:
    """Give learning rate and weight decay of the Trainer that is making its optimizer."""
    from transformers import Trainer

    for name, owner in _callers():
        if isinstance(owner, Trainer) and name == "create_optimizer":
            if any(isinstance(callback, SGCCallback) for callback in owner.callback_handler.callbacks):
                return {"lr": owner.args.learning_rate, "weight_decay": owner.args.weight_decay}
            break
    raise ValueError(
        'SGCFactory needs a learning rate, as in (SGCFactory, {"lr": 1e-3}); or add SGCCallback() to the callbacks of '
        "the Trainer, and learning_rate and weight_decay of its arguments hold"
    )


# ------------------------------------------------------------------------------------------ parameters into groups


def check_overrides(overrides: Mapping[str, Override], embeddings: str) -> None:
    """Check what can be checked without the model: the words, and the names of SGC's arguments.

    Raises:
        ValueError: an unknown word or argument.
        TypeError: a word or key that is none, or an override that is neither word nor dict.
    """
    word("embeddings", embeddings, POLICIES)
    if not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must be a dict, by the names of modules, got {shown(overrides)}")
    for key, override in overrides.items():
        if not isinstance(key, str):
            raise TypeError(f"overrides must be a dict, by the names of modules, got the key {shown(key)}")
        if not isinstance(override, Mapping):
            word(f"overrides[{key!r}]", override, POLICIES, "a dict or one of")
        else:
            for name in override:
                if name not in OPTIONS:
                    near = difflib.get_close_matches(str(name), OPTIONS, n=1)
                    raise ValueError(
                        f"overrides[{key!r}] names no argument of SGC: {name!r}"
                        + (f"; did you mean {near[0]!r}?" if near else "")
                    )


def parameter_groups(
    model: nn.Module, *, embeddings: str = "compressed", overrides: Mapping[str, Override] | None = None
) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    """Sort the parameters of a model by what holds for them; the model is left as it is.

    Args:
        model: as for `create_sgc_optimizer`.
        embeddings: as for `create_sgc_optimizer`.
        overrides: as for `create_sgc_optimizer`.

    Returns:
        The groups, for SGC; and the parameters that are trained now and are to be frozen.

    Raises:
        ValueError: as `create_sgc_optimizer`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"SGC's groups are made from a model, a torch.nn.Module, got {shown(model)}")
    overrides = {} if overrides is None else overrides
    check_overrides(overrides, embeddings)
    from transformers import Trainer

    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # uses no self
    inside_embeddings = _embedding_parameters(model)
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)

    kinds: list[tuple[dict[str, Any], bool, list[tuple[str, nn.Parameter]]]] = [({}, True, []), ({}, False, [])]
    frozen = []
    for param, known_as in names.items():
        if not param.requires_grad:
            continue
        policy = embeddings if param in inside_embeddings else None
        options = _options(known_as, overrides, policy)
        if options is None:
            frozen.append(param)
            continue
        decays = known_as[0] in decaying
        for other, other_decays, members in kinds:
            if other == options and other_decays == decays:
                members.append((known_as[0], param))
                break
        else:
            kinds.append((options, decays, [(known_as[0], param)]))
    _check_matches(model, names, overrides, decaying, {param for *_, members in kinds for _, param in members})
    groups = [
        {**options, **({} if decays else {"weight_decay": 0.0}), "params": members}
        for options, decays, members in kinds
        if members
    ]
    if not groups:
        raise ValueError("the model has no parameter to train: none requires a gradient")
    return groups, frozen


def _embedding_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Give the parameters of all embeddings and of the head that predicts tokens, as far as the model names one."""
    modules: list[Any] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):  # not every model has, or names, both
            modules.append(getattr(model, getter)())
    return {param for module in modules if isinstance(module, nn.Module) for param in module.parameters()}


def _matched(key: str, name: str) -> int:
    """Count the parts of a parameter's name up to the end of the deepest match of `key`; 0: it matches nowhere."""
    wanted, parts = key.split("."), name.split(".")
    for end in range(len(parts), len(wanted) - 1, -1):
        if all(map(fnmatchcase, parts[end - len(wanted) : end], wanted)):
            return end
    return 0


def _options(names: list[str], overrides: Mapping[str, Override], policy: str | None) -> dict[str, Any] | None:
    """Lay the overrides that match a parameter over each other, the longest match last; None: it is frozen."""
    by_name: list[tuple[str, dict[str, Any] | None]] = []
    for name in names:
        found = [(_matched(key, name), len(key), override) for key, override in overrides.items()]
        explicit = [(depth, 1, length, override) for depth, length, override in found if depth]
        if explicit:
            implied: list[tuple[int, int, int, Override]] = (
                [] if policy is None else [(len(name.split(".")) - 1, 0, 0, policy)]
            )
            layers = sorted(explicit + implied, key=lambda layer: layer[:3])
            by_name.append((name, _laid([override for *_, override in layers])))
    if not by_name:
        return _laid([] if policy is None else [policy])
    for name, options in by_name:
        if options != by_name[0][1]:
            raise ValueError(
                f"{by_name[0][0]} and {name} are one tied tensor: the overrides must agree on it, got "
                f"{by_name[0][1] or 'frozen'} and {options or 'frozen'}"
            )
    return by_name[0][1]


def _laid(layers: Iterable[Override]) -> dict[str, Any] | None:
    """Lay overrides over each other; whoever names a size or rule of the compression does not want a dense tensor."""
    options: dict[str, Any] = {}
    frozen = False
    for layer in layers:
        given = {} if isinstance(layer, str) else layer
        frozen = layer == "frozen" or (frozen and not isinstance(layer, str))
        if layer == "compressed" or any(name not in DENSE_OPTIONS for name in given):
            options = {name: value for name, value in options.items() if (name, value) != ("min_size", DENSE)}
        options |= {"min_size": DENSE} if layer == "dense" else given
    return None if frozen else options


def _check_matches(
    model: nn.Module,
    names: Mapping[nn.Parameter, list[str]],
    overrides: Mapping[str, Override],
    decaying: set[str],
    trained: set[nn.Parameter],
) -> None:
    """Refuse an override that would change nothing."""
    for key, override in overrides.items():
        matched = [param for param, known_as in names.items() if any(_matched(key, name) for name in known_as)]
        if not matched:
            known = [name for name, _ in model.named_modules() if name] + [n for both in names.values() for n in both]
            tails = {name.rpartition(".")[2]: name for name in reversed(known)}
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.4)
            near += [tails[tail] for tail in difflib.get_close_matches(key, tails, n=3) if tails[tail] not in near]
            raise ValueError(
                f"overrides[{key!r}] matches no module of the model"
                + (f"; the nearest are {', '.join(near[:3])}" if near else "")
            )
        if override != "frozen" and trained.isdisjoint(matched):
            raise ValueError(f"overrides[{key!r}] must name parameters that are trained, all {len(matched)} are frozen")
        decay = 0 if isinstance(override, str) else override.get("weight_decay", 0)
        if decay and not any(names[param][0] in decaying for param in matched):
            raise ValueError(
                f"overrides[{key!r}] sets weight_decay={decay}, but all that it names are biases and norms, which do "
                "not decay"
            )


# -------------------------------------------------------------------------------------------------- the callback


class SGCCallback(TrainerCallback):
    """Report SGC in the Trainer's logs and at the end of training, and say in a sentence when something is wrong.

    Every log of a training loss also gets, and so every backend of `report_to`:
        sgc/…: `SGC.stats()`, as far as seen; on every rank its own, of which the Trainer reports the main one's.
        sgc/memory/weights: bytes of all parameters, frozen ones too.
        sgc/memory/gradients: bytes of gradients at most held when the optimizer steps.
        sgc/memory/optimizer_state: bytes of the optimizer's state, compressed gradients included.
        sgc/memory/activations: on an accelerator, the peak of allocated memory since training began (its counter is
            reset then) less the three above, so whatever else is allocated is in it; on a CPU, where no allocator
            counts, the bytes that the forward pass of the model saves for backward, measured at one micro-batch after
            every log, parameters left out (and what checkpointing makes again, which is not saved). Left out for
            compiled models and for sharded ones on a CPU, where it can't be measured so.

    At the end `sgc_summary.json` is written into `output_dir` by the main process. Warnings and a short table go to the
    logger "sgc".

    Training is refused where the optimizer holds nothing of what the model trains, as when `peft_config` has made new
    parameters after it. What it leaves out is named, and so is a checkpoint that had no state of the optimizer.

    Example:
        >>> from transformers import Trainer
        >>> trainer = Trainer(..., callbacks=[SGCCallback()])  # doctest: +SKIP
    """

    _activations: _SavedForBackward | None = None

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        if self._activations is not None:
            self._activations.remove()  # the run before has failed
        self._optimizer: SGC | None = None
        self._first_step = self._sums = 0
        self._gradients: int | None = None  # not measured yet
        self._activations = None
        self._errors: deque[float] = deque(maxlen=FAILED_PROBES)
        self._noise: tuple[float, dict[str, Any]] | None = None
        self._skipped = 0.0
        self._warned: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the optimizer, compare it with the model, the checkpoint and the Trainer's arguments, begin to measure.

        Raises:
            RuntimeError: the optimizer holds none of the parameters that the model trains.
        """
        self._start()
        _go_first(self)
        self._optimizer = find_sgc(kwargs.get("optimizer"))
        if self._optimizer is None:
            kind = type(kwargs.get("optimizer")).__name__
            _logger.warning("SGCCallback reports nothing: the optimizer of this Trainer is no SGC but a %s", kind)
            return
        missing = left_out(self._optimizer, kwargs["model"])
        if state.is_world_process_zero:
            _compare_arguments(args, self._optimizer)
            _say_left_out(missing)
            _say_unloaded(self._optimizer, state)
        self._first_step = state.global_step
        self._skipped = self._optimizer.stats()["skipped_tensors"]
        device = _device(self._optimizer)
        if device.type != "cpu":
            with contextlib.suppress(RuntimeError):
                torch.accelerator.reset_peak_memory_stats(device)
        elif _can_be_hooked(kwargs["model"], args):
            self._activations = _SavedForBackward(kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the activations of this step's first forward pass, if a log has come since they were."""
        if self._activations is not None and self._activations.due:
            self._activations.arm()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the gradients while they are held."""
        if self._optimizer is not None:
            held = tensor_bytes(param.grad for param in kwargs["model"].parameters())
            self._gradients = max(self._gradients or 0, held)
            self._sums = max(self._sums, _sums_held(self._optimizer))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at every probe of the recovery."""
        if self._optimizer is not None and state.global_step % PROBE_EVERY == 0:
            stats = self._optimizer.stats()
            self._watch_gradients(stats, state)
            self._watch_recovery(stats, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add SGC's numbers to the log of a training loss."""
        if self._optimizer is None or logs is None or "loss" not in logs:
            return
        found = self._optimizer.stats() | {f"memory/{n}": held for n, held in self.memory(kwargs["model"]).items()}
        numbers = {f"sgc/{n}": float(value) for n, value in found.items() if value is not None and math.isfinite(value)}
        logs.update(numbers)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(numbers)
        if self._activations is not None:
            self._activations.due = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the summary."""
        if self._activations is not None:
            self._activations.remove()
        if self._optimizer is None or not state.is_world_process_zero:
            return
        self._watch_gradients(self._optimizer.stats(), state)
        path = Path(args.output_dir or ".") / "sgc_summary.json"
        if 0 < state.global_step == self._first_step and path.exists():
            return  # it tells of the run that is over
        summary = self.summary(state, kwargs["model"])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_json(path, summary)
        except OSError as error:  # what has been trained must not be lost for it
            _logger.warning("%s can't be written: %s", path, error.strerror)
        _logger.info("%s\n%s", path, _table(summary))

    def summary(self, state: TrainerState, model: nn.Module) -> dict[str, Any]:
        """Give what `sgc_summary.json` holds; bytes are of this process.

        Returns:
            steps; parameters, those trained; state_bytes, adamw_state_bytes (8 per parameter) and compression_ratio,
            one over the other; state_share, of each component; memory, as in the logs; peak_memory_bytes, of the
            accelerator or else of the process; skipped_tensors; stats; groups, each with its parameters and all of its
            hyperparameters.
        """
        assert self._optimizer is not None  # found when training began
        optimizer, stats = self._optimizer, self._optimizer.stats()
        parts = _state_parts(optimizer)
        params = sum(param.numel() for param in optimizer.held_tensors())
        return {
            "steps": state.global_step,
            "parameters": params,
            "state_bytes": int(stats["state_bytes"]),
            "adamw_state_bytes": 8 * params,
            "compression_ratio": stats["compression_ratio"],
            "state_share": {name: held / max(1, sum(parts.values())) for name, held in parts.items() if held},
            "memory": self.memory(model),
            "peak_memory_bytes": _peak_memory(_device(optimizer)),
            "skipped_tensors": int(stats["skipped_tensors"]),
            "stats": {name: value if math.isfinite(value) else None for name, value in stats.items()},
            "groups": [_described(group) for group in optimizer.param_groups],
        }

    def memory(self, model: nn.Module) -> dict[str, int | None]:
        """Give the bytes of weights, gradients, optimizer_state and activations, as in the logs; None: not measured."""
        assert self._optimizer is not None  # found when training began
        weights, state = tensor_bytes(model.parameters()), self._optimizer.state_bytes()
        state += self._sums - _sums_held(self._optimizer)  # at most held, as of the gradients
        device = _device(self._optimizer)
        if device.type == "cpu":
            activations = self._activations.bytes if self._activations is not None else None
        else:
            here = [param for param in model.parameters() if param.device == device]
            held = tensor_bytes(here) + (self._gradients or 0) + self._sums
            held += tensor_bytes(_state_tensors(self._optimizer), device)
            peak = _peak_memory(device)
            activations = None if peak is None else max(0, peak - held)
        return {
            "weights": weights,
            "gradients": self._gradients,
            "optimizer_state": state,
            "activations": activations or None,
        }

    def _watch_gradients(self, stats: Mapping[str, float], state: TrainerState) -> None:
        """Warn once of gradients left out."""
        skipped = stats["skipped_tensors"] - self._skipped
        if skipped > 0 and "gradients" not in self._warned and state.is_world_process_zero:
            self._warned.add("gradients")
            _logger.warning(
                "%d gradients were not finite up to step %d: their tensors are left as they were; lower the learning "
                "rate, or look for the batch that makes them, if it goes on",
                skipped,
                state.global_step,
            )

    def _watch_recovery(self, stats: Mapping[str, float], state: TrainerState) -> None:
        """Warn once if, over several probes, the updates explain the sketches hardly better than they would noise."""
        assert self._optimizer is not None
        self._errors.append(stats["recovery_error"])
        error = sum(self._errors) / FAILED_PROBES
        if len(self._errors) < FAILED_PROBES or math.isnan(error) or "recovery" in self._warned:
            return
        if self._noise is None:
            errors = [(_noise_error(group), group) for group in self._optimizer.param_groups]
            self._noise = max(errors, key=lambda found: found[0])
        noise, group = self._noise
        if noise > 0 and error >= NOISE_SHARE * noise and state.is_world_process_zero:
            self._warned.add("recovery")
            _logger.warning(
                "recovery finds next to nothing: at the last %d probes the updates left %.2f of the sketches "
                "unexplained, and of pure noise they would leave %.2f; raise sketch_size=%d, or lower sparsity=%d or "
                "chunk_size=%s, or set sketch_size=0",
                FAILED_PROBES,
                error,
                noise,
                group["sketch_size"],
                group["sparsity"],
                group["chunk_size"],
            )


def find_sgc(optimizer: Any) -> SGC | None:
    """Find SGC inside the wrappers of accelerate and DeepSpeed, each of which keeps it as `optimizer`."""
    seen: list[Any] = []
    while optimizer is not None and not isinstance(optimizer, SGC) and not any(optimizer is other for other in seen):
        seen.append(optimizer)
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer if isinstance(optimizer, SGC) else None


def tensor_bytes(tensors: Iterable[Tensor | None], device: torch.device | None = None) -> int:
    """Count the bytes of the distinct storages behind some tensors: tied ones once, of sharded ones this rank's.

    Args:
        tensors: None among them is passed over, and so are compressed gradients, which are the optimizer's.
        device: count what lies there only.
    """
    storages: dict[tuple[torch.device, int], int] = {}
    for tensor in tensors:
        if tensor is None or isinstance(tensor, CompressedGradient) or (device and tensor.device != device):
            continue
        storage = (tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage()
        storages[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _callers() -> Iterator[tuple[str, Any]]:
    """Name the methods under way and their objects, innermost first: transformers hands its Trainer to nobody."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame.f_code.co_name, frame.f_locals.get("self")
        frame = frame.f_back


def _go_first(callback: TrainerCallback) -> None:
    """Put a callback before those that report, which the Trainer calls first and which would not see what it adds."""
    for _, handler in _callers():
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            handler.callbacks.remove(callback)
            handler.callbacks.insert(0, callback)
            return


def left_out(optimizer: SGC, model: nn.Module) -> list[str]:
    """Name the parameters that a model trains and an optimizer does not hold.

    A sharding harness may have put other tensors in the place of the optimizer's, or of the model's. The optimizer
    knows which it was given; where neither those nor the ones it holds now are the model's, names decide.

    Raises:
        RuntimeError: it holds none of them.
    """
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    given = {id(param) for params in optimizer._given for param in params}
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    missing = [name for name, param in trained.items() if id(param) not in given | held]
    if len(missing) < len(trained):
        return missing
    if not held <= given:
        names = {name for group in optimizer.param_groups for name in group.get("param_names") or ()}
        if not names or not names.isdisjoint(WRAPPER.sub("", name) for name in trained):
            return []
    lr = float(optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"]))
    raise RuntimeError(
        f"the optimizer holds none of the {len(trained)} tensors that the model trains, and so would train nothing: it "
        "was made before they were, as those of peft_config are, or for another model. Make the Trainer without "
        f'optimizers=, and then write: trainer.optimizer_cls_and_kwargs = (SGCFactory, {{"lr": {lr:g}}})'
    )


def _say_left_out(names: list[str]) -> None:
    if names:
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        _logger.warning("%d tensors that require a gradient are not the optimizer's, and stay: %s", len(names), some)


def _say_unloaded(optimizer: SGC, state: TrainerState) -> None:
    """Say that a run goes on from a checkpoint of which the optimizer has loaded nothing."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    given = {id(param) for params in optimizer._given for param in params}
    if not params or not all(hasattr(param, "to_local") or id(param) in given for param in params):
        return  # DeepSpeed loads its partitions by itself, and warns of what is missing
    counted = (
        any(group["steps"] for group in optimizer.param_groups) and not optimizer._loop.steps
    )  # since it was loaded
    if state.global_step and not counted:
        _logger.warning(
            "training goes on at step %d, but the optimizer has loaded no state and begins anew: the checkpoint lacks "
            "optimizer.pt or scheduler.pt, as with save_only_model; for a new run with its weights open the model from "
            "its folder, and leave resume_from_checkpoint out",
            state.global_step,
        )


def _compare_arguments(args: TrainingArguments, optimizer: SGC) -> None:
    """Say which of the Trainer's arguments do not reach an optimizer that is given its own."""
    fields = type(args).__dataclass_fields__
    for theirs, ours, own in (("learning_rate", "lr", "initial_lr"), ("weight_decay", "weight_decay", "weight_decay")):
        wanted, values = getattr(args, theirs), [float(g.get(own, g[ours])) for g in optimizer.param_groups]
        if wanted != fields[theirs].default and wanted not in values:
            _logger.warning(
                "TrainingArguments has %s=%g, which does not reach SGC: it was made with %s=%g",
                theirs,
                wanted,
                ours,
                values[0],
            )


# ------------------------------------------------------------------------------------------------ what is measured


class _SavedForBackward:
    """Counts the bytes that a model's forward pass saves for backward: distinct storages, parameters left out.

    For one pass it stands in the place of `model.forward`, which it puts back before that begins: nothing of it stays
    on the model, however the pass or the run ends.
    """

    def __init__(self, model: nn.Module) -> None:
        self.bytes, self.due = 0, True
        self._model = model
        self._forward: Callable[..., Any] | None = None  # what is in the place of the model's while it is armed
        self._before: Callable[..., Any] | None = None  # what was set there before, by others

    def arm(self) -> None:
        """Measure the next forward pass in training."""
        before = vars(self._model).get("forward")
        if isinstance(other := getattr(before, "meter", None), _SavedForBackward):
            other.remove()  # a run that failed between the beginning of a step and its forward pass
            before = vars(self._model).get("forward")
        forward = self._model.forward

        @functools.wraps(forward)
        def measured(*args: Any, **kwargs: Any) -> Any:
            if self._forward is not measured or not self._model.training or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            self.remove()
            storages: dict[int, int] = {}

            def note(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                outputs = forward(*args, **kwargs)
            for param in self._model.parameters():
                storages.pop(param.untyped_storage().data_ptr(), None)
            self.bytes, self.due = max(self.bytes, sum(storages.values())), False
            return outputs

        vars(measured)["meter"] = self
        self._before, self._forward = before, measured
        self._model.forward = measured

    def remove(self) -> None:
        """Put the model's forward back."""
        if self._forward is not None and vars(self._model).get("forward") is self._forward:
            if self._before is None:
                del self._model.forward
            else:
                self._model.forward = self._before
        self._forward = self._before = None


def _can_be_hooked(model: nn.Module, args: TrainingArguments) -> bool:
    compiled = args.torch_compile or any(module._compiled_call_impl is not None for module in model.modules())
    sharded = any(hasattr(param, "to_local") for param in model.parameters())
    return not compiled and not sharded


def _device(optimizer: SGC) -> torch.device:
    return next((param.device for param in optimizer.held_tensors()), torch.device("cpu"))


def _peak_memory(device: torch.device) -> int | None:
    """Bytes at most allocated on an accelerator, or at most resident for the process where the system says it."""
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError):  # not every accelerator's allocator counts
            return torch.accelerator.max_memory_allocated(device)
        return None
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _noise_error(group: Mapping[str, Any]) -> float:
    """Give the share of a sketch of pure noise that recovery leaves unexplained: ‖y − A·u‖/‖y‖, y ~ N(0, I).

    With y as long as it is, the best s' of n columns explain much of it, though nothing is there to be found: the bound
    that recovery must beat. 0 where nothing is recovered from a sketch. (ours)
    """
    k, recovered = group["sketch_size"], group["recovered"]
    layouts = [tensor_layout(param.shape, group) for param in group["params"]]
    chunks = [layout.chunk for layout in layouts if layout is not None and layout.chunk > k]
    if not k or not chunks:
        return 0.0
    n = max(set(chunks), key=chunks.count)
    projection = Projection(k, group["seed"])
    y = torch.randn(max(4, min(256, (1 << 22) // n)), k, generator=torch.Generator().manual_seed(0))
    index, value = pursue(y, n, projection, recovered, group["recovery"])
    left = y - projection.project(index, value, n)
    return math.sqrt(left.square().sum().item() / y.square().sum().item())


def _state_tensors(optimizer: SGC) -> Iterator[Tensor]:
    states = (held for held in optimizer.state.values() if isinstance(held, dict))  # others may keep anything here
    return (value for held in states for value in held.values() if isinstance(value, Tensor))


def _sums_held(optimizer: SGC) -> int:
    """Bytes of compressed gradients held now."""
    return 0 if optimizer._compressor is None else optimizer._compressor.bytes()


def _state_parts(optimizer: SGC) -> dict[str, int]:
    """Bytes of the state by component; what is in none of them (for `stats`) is the rest of `state_bytes`."""
    parts = dict.fromkeys(COMPONENTS, 0)
    for held in filter(lambda held: isinstance(held, dict), optimizer.state.values()):
        for component, names in COMPONENTS.items():  # of DeepSpeed's partitions, "7.row"
            found = [tensor for name, tensor in held.items() if name.rpartition(".")[2] in names]
            parts[component] += sum(tensor.numel() * tensor.element_size() for tensor in found)
    parts["projection"] = sum(projection.bytes() for projection in optimizer._loop.projections.values())
    return {**parts, "probes": optimizer.state_bytes() - sum(parts.values())}


def _described(group: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a group in plain numbers and words."""
    plain = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    return {
        "names": group.get("param_names"),
        "parameters": sum(param.numel() for param in group["params"]),
        **{name: float(value) if isinstance(value, Tensor) else value for name, value in plain.items()},
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a whole file or none: beside its place first, then into it."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=2, allow_nan=False, default=str)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _table(summary: Mapping[str, Any]) -> str:
    rows = [(name.replace("_", " "), held) for name, held in summary["memory"].items() if held is not None]
    lines = [f"{name:<16} {held / 1e6:>12,.2f} MB" for name, held in rows]
    shares = ", ".join(f"{share:.0%} {name.replace('_', ' ')}" for name, share in summary["state_share"].items())
    return "\n".join(
        [
            f"SGC, {summary['steps']:,} steps, {summary['parameters']:,} parameters",
            *lines,
            f"state: {summary['compression_ratio']:.4f} of AdamW's ({shares})",
            f"skipped tensors: {summary['skipped_tensors']}",
        ]
    )

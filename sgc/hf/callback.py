"""The callback that reports in a Trainer how SGC is doing."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from sgc.hf.checks import compare_arguments, find_sgc, left_out, warn_left_out, warn_unloaded
from sgc.hf.measures import (
    SavedForBackward,
    can_be_hooked,
    describe,
    device_of,
    noise_error,
    peak_memory,
    state_parts,
    state_tensors,
    sums_held,
    table,
    tensor_bytes,
    write_json,
)
from sgc.optimizer import SGC
from sgc.probes import PROBE_EVERY

FAILED_PROBES = 5  # in a row, before recovery is said to fail
NOISE_SHARE = 0.93  # of what noise leaves: runs that learned stayed below 0.9 of it, those that did not above 0.95
_logger = logging.getLogger("sgc")


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

    _activations: SavedForBackward | None = None

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
            compare_arguments(args, self._optimizer)
            warn_left_out(missing)
            warn_unloaded(self._optimizer, state)
        self._first_step = state.global_step
        self._skipped = self._optimizer.stats()["skipped_tensors"]
        device = device_of(self._optimizer)
        if device.type != "cpu":
            with contextlib.suppress(RuntimeError):
                torch.accelerator.reset_peak_memory_stats(device)
        elif can_be_hooked(kwargs["model"], args):
            self._activations = SavedForBackward(kwargs["model"])

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
            self._sums = max(self._sums, sums_held(self._optimizer))

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
            write_json(path, summary)
        except OSError as error:  # what has been trained must not be lost for it
            _logger.warning("%s can't be written: %s", path, error.strerror)
        _logger.info("%s\n%s", path, table(summary))

    def summary(self, state: TrainerState, model: nn.Module) -> dict[str, Any]:
        """Return what `sgc_summary.json` holds; bytes are of this process.

        Returns:
            steps; parameters, those trained; state_bytes, adamw_state_bytes (8 per parameter) and compression_ratio,
            one over the other; state_share, of each component; memory, as in the logs; peak_memory_bytes, of the
            accelerator or else of the process; skipped_tensors; stats; groups, each with its parameters and all of its
            hyperparameters.
        """
        assert self._optimizer is not None  # found when training began
        optimizer, stats = self._optimizer, self._optimizer.stats()
        parts = state_parts(optimizer)
        params = sum(param.numel() for param in optimizer.held_tensors())
        return {
            "steps": state.global_step,
            "parameters": params,
            "state_bytes": int(stats["state_bytes"]),
            "adamw_state_bytes": 8 * params,
            "compression_ratio": stats["compression_ratio"],
            "state_share": {name: held / max(1, sum(parts.values())) for name, held in parts.items() if held},
            "memory": self.memory(model),
            "peak_memory_bytes": peak_memory(device_of(optimizer)),
            "skipped_tensors": int(stats["skipped_tensors"]),
            "stats": {name: value if math.isfinite(value) else None for name, value in stats.items()},
            "groups": [describe(group) for group in optimizer.param_groups],
        }

    def memory(self, model: nn.Module) -> dict[str, int | None]:
        """Return the bytes of weights, gradients, state and activations, as in the logs; None: not measured."""
        assert self._optimizer is not None  # found when training began
        weights, state = tensor_bytes(model.parameters()), self._optimizer.state_bytes()
        state += self._sums - sums_held(self._optimizer)  # at most held, as of the gradients
        device = device_of(self._optimizer)
        if device.type == "cpu":
            activations = self._activations.bytes if self._activations is not None else None
        else:
            here = [param for param in model.parameters() if param.device == device]
            held = tensor_bytes(here) + (self._gradients or 0) + self._sums
            held += tensor_bytes(state_tensors(self._optimizer), device)
            peak = peak_memory(device)
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
            errors = [(noise_error(group), group) for group in self._optimizer.param_groups]
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


def callers() -> Iterator[tuple[str, Any]]:
    """Name the methods under way and their objects, innermost first: transformers hands its Trainer to nobody."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame.f_code.co_name, frame.f_locals.get("self")
        frame = frame.f_back


def _go_first(callback: TrainerCallback) -> None:
    """Put a callback before those that report, which the Trainer calls first and which would not see what it adds."""
    for _, handler in callers():
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            handler.callbacks.remove(callback)
            handler.callbacks.insert(0, callback)
            return

"""Checkpoints that survive a run that dies at any moment: whole, or seen not to be.

transformers' Trainer writes the files of a checkpoint one after the other into the folder that bears its name, and
`trainer_state.json` last. But it writes over what an earlier run left there, does not wait for the random number
generators of the other ranks, counts half-written folders as checkpoints to keep, and deletes old ones file by file.
With `WholeCheckpoints` beside it a folder is a whole checkpoint if and only if its `trainer_state.json` can be read:

    class MyTrainer(WholeCheckpoints, Trainer): ...

    trainer.train(resume_from_checkpoint=last_whole(args.output_dir))

transformers also resumes in silence where a file is missing, and a run that is over takes one step more. Here what is
missing, cut or of another run is refused, and a run that is over stays over.
"""

from __future__ import annotations

import errno
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE = "trainer_state.json"
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_*", "latest")  # of one process, FSDP's two, DeepSpeed
SCHEDULER = ("scheduler.pt", "latest")
WEIGHTS = ("model.safetensors", "*.safetensors*", "pytorch_model*", "*/adapter_model.*", "latest")
MB = 10**6


class SaveError(RuntimeError):
    """Something can't be written; the sentence says what, why, and what is left."""


class CheckpointError(ValueError):
    """A checkpoint can't be resumed from; the sentence says which file and why."""


class OtherNames(ValueError):
    """The names of the weights in a checkpoint are not those of the model."""


def first_line(error: BaseException) -> str:
    """Return the beginning of what an error says, or its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def read_state(checkpoint: Path) -> TrainerState:
    """Read what a Trainer wrote last into a checkpoint.

    Raises:
        CheckpointError: the file is missing, cut, or not what a Trainer writes: the checkpoint is not whole.
    """
    file = checkpoint / STATE
    try:
        state = TrainerState.load_from_json(str(file))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"'{file}' can't be read: {first_line(error)}") from None
    for name, kind in (("global_step", int), ("max_steps", int), ("log_history", list), ("stateful_callbacks", dict)):
        value = getattr(state, name)
        if not isinstance(value, kind) or (kind is int and value < 1):
            wanted = "a whole number above 0" if kind is int else f"a {kind.__name__}"
            raise CheckpointError(f"'{file}' must hold {name}, {wanted}, got {str(value)[:40]}")
    return state


def check_checkpoint(checkpoint: Path) -> None:
    """Refuse a checkpoint from which a run would not go on as if nothing had happened.

    Raises:
        CheckpointError: a file is missing or cut.
    """
    read_state(checkpoint)
    for part, patterns in (("weights", WEIGHTS), ("optimizer state", OPTIMIZER), ("scheduler state", SCHEDULER)):
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            raise CheckpointError(
                f"checkpoint '{checkpoint}' has no {part} ({patterns[0]}; save_only_model leaves weights only): resume "
                "from another one, or begin anew"
            )
    for file in sorted(path for path in checkpoint.glob("*.*") if path.is_file()):
        check_file(file)


def check_file(file: Path) -> None:
    """Refuse a file of tensors that is cut, without reading the tensors.

    Raises:
        CheckpointError: its table of contents can't be read, or promises more than there is.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix in (".pt", ".pth", ".bin"):
            zipfile.ZipFile(file).close()  # its table of contents is at the end
    except (OSError, SafetensorError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"'{file}' is damaged: {first_line(error)}; resume from another checkpoint, or begin anew"
        ) from None


@contextmanager
def refused_if_it_does_not_fit(checkpoint: str | Path, part: str) -> Iterator[None]:
    """Turn a failure to read a part of a checkpoint, or to put it in its place, into a sentence.

    Raises:
        CheckpointError: in the place of what torch, transformers or the optimizer raised.
    """
    try:
        yield
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a file that is damaged or of another run makes its readers raise anything
        raise CheckpointError(
            f"the {part} in checkpoint '{checkpoint}' can't be taken over by this run: {first_line(error)}; resume "
            "from another one, or begin anew"
        ) from error


def step_of(checkpoint: Path) -> int | None:
    """Return the step at which a checkpoint was written; None: it is not whole."""
    try:
        return read_state(checkpoint).global_step
    except CheckpointError:
        return None


def sort_whole(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the whole checkpoints of a folder, the first step first, and the incomplete ones, by name."""
    found = sorted(path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir())
    steps = {path: step_of(path) for path in found}
    whole = sorted((step, path) for path, step in steps.items() if step is not None)
    return [path for _, path in whole], [path for path in found if steps[path] is None]


def last_whole(folder: str | Path) -> str | None:
    """Return the last whole checkpoint of a folder, for `Trainer.train(resume_from_checkpoint=…)`; None: there is none.

    Example:
        >>> last_whole("no/such/folder") is None
        True
    """
    whole, _ = sort_whole(Path(folder))
    return str(whole[-1]) if whole else None


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; from the first moment on it is not whole."""
    (checkpoint / STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


@contextmanager
def said_if_it_fails(what: str, folder: Path) -> Iterator[None]:
    """Turn a failure to write into a sentence with the room that is left on the disk.

    Raises:
        SaveError: in the place of what torch, safetensors or the system raised.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        near = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        free = shutil.disk_usage(near).free
        said = str(error).splitlines()[0]
        reason = "the disk is full" if free < MB or os.strerror(errno.ENOSPC) in said else said  # torch gives no reason
        room = f"{free / MB:,.1f} MB are free there"
        raise SaveError(f"{what} can't be saved in '{folder}': {reason} ({room})") from error


class WholeCheckpoints:
    """Beside a Trainer: a folder is a whole checkpoint if and only if its trainer_state.json can be read.

    What is in the way of a new checkpoint is deleted before, and what `save_total_limit` is too small for after it is
    whole; incomplete ones do not count towards the limit and are deleted with the rest. A checkpoint that lacks a
    file, is damaged or does not fit is not resumed from, and one of the last step trains no further.

    Raises:
        SaveError: a checkpoint can't be written; what is there of it is deleted, and older ones are left alone.
        CheckpointError: a checkpoint can't be resumed from.
    """

    def train(self: Any, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise CheckpointError(f"there is no whole checkpoint in '{self.args.output_dir}'")
        if resume_from_checkpoint:
            check_checkpoint(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # ------------------------------------------------------------------------------------------------- resuming

    def _run_epoch(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:  # transformers asks after a step only
            self.control.should_training_stop = True

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        with refused_if_it_does_not_fit(resume_from_checkpoint, "weights"):
            try:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            except OtherNames:  # as of experts, which are stacked in memory and apart in files
                if not isinstance(self.model, PreTrainedModel):
                    raise
                options = {"dtype": self.model.dtype, "config": self.model.config, "trust_remote_code": False}
                opened, found = type(self.model).from_pretrained(
                    resume_from_checkpoint, output_loading_info=True, **options
                )
                if found["missing_keys"] or found["unexpected_keys"]:
                    raise
                self.model.load_state_dict(opened.state_dict())

    def _prepare_for_training(self: Any, max_steps: int, loader: Any, resume_from_checkpoint: str | None) -> Any:
        if resume_from_checkpoint is None or not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, loader, resume_from_checkpoint)
        with refused_if_it_does_not_fit(resume_from_checkpoint, "weights or optimizer state"):  # DeepSpeed reads both
            return super()._prepare_for_training(max_steps, loader, resume_from_checkpoint)

    def _load_best_model(self: Any) -> None:
        with refused_if_it_does_not_fit(self.state.best_model_checkpoint, "weights"):
            super()._load_best_model()

    def _issue_warnings_after_load(self: Any, load_result: Any) -> None:
        tensors = self.model.state_dict()
        missing = set(load_result.missing_keys) - set(self.model._keys_to_ignore_on_save or ())
        loaded = {tensor.data_ptr() for name, tensor in tensors.items() if name not in missing}
        missing = {name for name in missing if tensors[name].data_ptr() not in loaded}  # tied ones are written once
        for said, names in (("lack", missing), ("have, and the model has not,", load_result.unexpected_keys)):
            if names:
                raise OtherNames(f"they {said} {sorted(names)[0]} and {len(names) - 1} more")

    def _init_training_state(self: Any, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        with refused_if_it_does_not_fit(self.args.output_dir, STATE):
            return super()._init_training_state(max_steps, *args, **kwargs)

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        before = [set(group) for group in self.optimizer.param_groups]
        with refused_if_it_does_not_fit(checkpoint, "optimizer or scheduler state"):
            super()._load_optimizer_and_scheduler(checkpoint)
            for ours, group in zip(before, self.optimizer.param_groups, strict=True):
                if foreign := set(group) - ours - {"param_names", "initial_lr"}:
                    raise ValueError(f"it is of another optimizer, one with {', '.join(sorted(foreign))}")
            keeps = any("betas" in group for group in self.optimizer.param_groups)
            if keeps and not self.is_deepspeed_enabled and not self.optimizer.state:
                raise ValueError("it holds no moments")

    def _load_scaler(self: Any, checkpoint: str | None) -> None:
        with refused_if_it_does_not_fit(checkpoint or "", "gradient scaler's state"):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self: Any, checkpoint: str | None) -> None:
        many = self.args.world_size > 1
        file = Path(checkpoint or "", f"rng_state_{self.args.process_index}.pth" if many else "rng_state.pth")
        if checkpoint is not None and not file.is_file():
            warnings.warn(
                f"'{file}' is missing: the run goes on with other random numbers than one that was not interrupted",
                stacklevel=2,
            )
        with refused_if_it_does_not_fit(checkpoint or "", "state of the random number generators"):
            super()._load_rng_state(checkpoint)

    # --------------------------------------------------------------------------------------------------- saving

    @contextmanager
    def _no_limit(self: Any) -> Iterator[int | None]:
        """Keep transformers from deleting checkpoints, which it does file by file and by the clock."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield limit
        finally:
            self.args.save_total_limit = limit

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            discard(folder)
        self.accelerator.wait_for_everyone()  # no rank writes into what is being deleted
        try:
            with self._no_limit() as limit, said_if_it_fails(folder.name, run):
                super()._save_checkpoint(model, trial)
        except SaveError as error:
            discard(folder)
            left = last_whole(run)
            raise SaveError(f"{error}; {'no' if left is None else left + ' is the last'} whole checkpoint") from error
        if self.args.should_save and limit is not None and limit > 0:
            self._delete_old(folder, limit)

    def _save_rng_state(self: Any, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state that makes the checkpoint whole comes after every rank's files

    def _delete_old(self: Any, written: Path, limit: int) -> None:
        whole, incomplete = sort_whole(written.parent)
        newest = [*(path for path in whole if path != written), written]  # an earlier run may have gone further
        best = self.state.best_model_checkpoint
        kept = {
            *newest[-limit:],
            *(path for path in whole if best is not None and path.resolve() == Path(best).resolve()),
        }
        for path in (*incomplete, *newest):
            if path not in kept:
                discard(path)

    def _finalize_training(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._no_limit():  # the last checkpoint stays beside the best: it says that the run is over
            return super()._finalize_training(*args, **kwargs)

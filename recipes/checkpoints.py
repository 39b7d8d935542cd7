"""Checkpoints that survive a run that dies at any moment: whole, or seen not to be.

transformers' Trainer writes the files of a checkpoint one after the other into the folder that bears its name, and
`trainer_state.json` last. But it writes over what an earlier run left there, does not wait for the random number
generators of the other ranks, counts half-written folders as checkpoints to keep, and deletes old ones file by file.
With `WholeCheckpoints` beside it a folder is a whole checkpoint if and only if its `trainer_state.json` can be read:

    class MyTrainer(WholeCheckpoints, Trainer): ...

    trainer.train(resume_from_checkpoint=last_whole(args.output_dir))
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE = "trainer_state.json"
MB = 10**6


class SaveError(RuntimeError):
    """Something can't be written; the sentence says what, why, and what is left."""


def step_of(checkpoint: Path) -> int | None:
    """Return the step at which a checkpoint was written; None: it is not whole."""
    try:
        return int(json.loads((checkpoint / STATE).read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
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
    whole; incomplete ones do not count towards the limit and are deleted with the rest.

    Raises:
        SaveError: a checkpoint can't be written; what is there of it is deleted, and older ones are left alone.
    """

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        run = Path(self._get_output_dir(trial=trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            discard(folder)
        self.accelerator.wait_for_everyone()  # no rank writes into what is being deleted
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with said_if_it_fails(folder.name, run):
                super()._save_checkpoint(model, trial)
        except SaveError as error:
            discard(folder)
            left = last_whole(run)
            raise SaveError(f"{error}; {'no' if left is None else left + ' is the last'} whole checkpoint") from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit is not None and limit > 0:
            self._delete_old(run, limit)

    def _save_rng_state(self: Any, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state that makes the checkpoint whole comes after every rank's files

    def _delete_old(self: Any, run: Path, limit: int) -> None:
        whole, incomplete = sort_whole(run)
        newest = sorted(whole, key=lambda path: (path / STATE).stat().st_mtime)  # equal times leave the steps' order
        best = self.state.best_model_checkpoint
        kept = {*newest[-limit:], *(path for path in whole if best is not None and path == Path(best))}
        for path in (*incomplete, *newest):
            if path not in kept:
                discard(path)

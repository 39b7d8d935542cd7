"""What the federated recipes share: how a run begins in its folder, goes on there, is stopped, and ends."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils.memory import should_reduce_batch_size
from tqdm import tqdm

from federated.files import check_folder, sentence
from federated.simulate import Simulation


class Stopped(Exception):
    """Ctrl-C or SIGTERM ended a run; the sentence says what is saved.

    Args:
        said: the sentence.
        number: of the signal.
    """

    def __init__(self, said: str, number: int) -> None:
        super().__init__(said)
        self.number = number


def folder_of(args: argparse.Namespace) -> Path:
    """Return the folder of a run.

    Raises:
        ValueError: it can't be written, or holds another run, and nothing was said about that; or no round is to be
            played.
    """
    if args.rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {args.rounds}")
    out = Path(args.output_dir)
    for folder in (out, out / "model"):
        check_folder(folder, "--output_dir")
    if (out / "rows.jsonl").exists() and not (args.resume or args.overwrite):
        raise ValueError(f"the folder '{out}' holds another run; go on with --resume, or begin anew with --overwrite")
    return out


def resume(sim: Simulation, args: argparse.Namespace) -> None:
    """Resume from the last checkpoint where that was asked for."""
    if args.resume:
        reached = sim.resume()
        tqdm.write(f"resumed after round {reached}" if reached else "no checkpoint yet: begun anew")


def rounds(sim: Simulation, number: int) -> Iterator[dict[str, Any]]:
    """Play the rounds that are left of a run; of one that is over, print how good it is.

    Ctrl-C or SIGTERM ends it after the round under way, with a checkpoint; a second one ends it at once.

    Raises:
        Stopped: it was told to stop.
    """
    if sim.number >= number or sim.ended:
        measured = ", ".join(f"{name} {value:.4f}" for name, value in sim.evaluate().items())
        tqdm.write(f"the run is over, after round {sim.number} of {number}: {measured}")
    with _noted() as received:
        try:
            for row in sim.run(number):
                yield row
                if received:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise Stopped(_keep(sim), received[0] if received else signal.SIGINT) from None


def _keep(sim: Simulation) -> str:
    """Save what there is of a run that was stopped, and return in a sentence what that is."""
    try:
        kept = sim.save() if sim.number else None
    except RuntimeError:  # in the middle of a round
        kept = sim.last_checkpoint()
    if kept is None:
        return "stopped before a round was saved; nothing is lost but the rounds so far"
    return f"stopped after round {sim.number}; saved in '{kept}', go on with --resume"


@contextmanager
def _noted() -> Iterator[list[int]]:
    """Record the first signal to stop, instead of obeying it; a second one is obeyed."""
    received: list[int] = []
    held: dict[int, Any] = {}

    def restore() -> None:
        while held:
            signal.signal(*held.popitem())

    def note(number: int, _: Any) -> None:
        received.append(number)
        restore()

    if threading.current_thread() is threading.main_thread():  # others can't set handlers
        held |= {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        restore()


def finish(sim: Simulation, out: Path, rounds: int, *written: str) -> int:
    """Save the model, print what was written and whether the run came to its end; return the exit status."""
    sim.model().save_pretrained(out / "model")
    print(f"{out}: {', '.join(['rows.jsonl', *written, 'model/'])}")
    if sim.ended:
        print(f"the run ended after round {sim.number} of {rounds}: {sim.ended}", file=sys.stderr)
        return 1
    return 0


def said(run: Callable[[], int]) -> int:
    """Run a recipe, or print in a sentence why not; return the exit status."""
    try:
        return run()
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        print(f"error: it does not fit into memory: {sentence(error)}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        print("stopped: no round was being played, nothing is lost", file=sys.stderr)
        return 128 + signal.SIGINT

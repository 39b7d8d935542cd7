"""What the federated recipes share: how a run begins in its folder, goes on there, and ends."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from federated.simulate import Simulation


def folder_of(args: argparse.Namespace) -> Path:
    """Give the folder of a run.

    Raises:
        ValueError: it holds another one, and nothing was said about that; or no round is to be played.
    """
    if args.rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {args.rounds}")
    out = Path(args.output_dir)
    if (out / "rows.jsonl").exists() and not (args.resume or args.overwrite):
        raise ValueError(f"the folder '{out}' holds another run; go on with --resume, or begin anew with --overwrite")
    return out


def resume(sim: Simulation, args: argparse.Namespace) -> None:
    """Go on from the last checkpoint where that was asked for."""
    if args.resume:
        reached = sim.resume()
        tqdm.write(f"resumed after round {reached}" if reached else "no checkpoint yet: begun anew")


def finish(sim: Simulation, out: Path, rounds: int, *written: str) -> int:
    """Save the model, say what was written and whether the run came to its end; give the exit status."""
    sim.model().save_pretrained(out / "model")
    print(f"{out}: {', '.join(['rows.jsonl', *written, 'model/'])}")
    if sim.ended:
        print(f"the run ended after round {sim.number} of {rounds}: {sim.ended}", file=sys.stderr)
        return 1
    return 0

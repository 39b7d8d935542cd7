"""Checkpoints of a run in its folder: everything that the next round depends on, whole or not at all.

A checkpoint is a folder `checkpoint-N`, made after round N: state.pt, and a file for every memory that is large.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from federated.downlink import Downlink
from federated.files import line_of, rows_of, sentence
from federated.memory import Memories
from federated.round import World
from federated.uplink import Uplink
from sgc.codec import Codec

_PLAIN = (bool, int, float, str)
_LINKS = (Downlink, Uplink, Codec)  # what holds settings
_PARTS = {"round": int, "skipped_in_a_row": int, "ended": str, "describes": dict, "server": dict, "uplink": dict,
          "memories": dict}  # fmt: skip


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints that are ours, the first round first: other programs name theirs alike."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{8,}", path.name)]
    return sorted((path for path in found if (path / "state.pt").is_file()), key=lambda path: int(path.name[11:]))


def clear(folder: Path) -> None:
    """Delete what another run has left, its rows and checkpoints."""
    (folder / "rows.jsonl").unlink(missing_ok=True)
    for old in [*checkpoints(folder), *folder.glob(".checkpoint-*")]:
        shutil.rmtree(old)


def write(folder: Path, state: dict[str, Any], memories: Memories) -> Path:
    """Write a checkpoint, and delete the older ones.

    Args:
        folder: of the run.
        state: the parts of state.pt but the memories.
        memories: what is remembered for the devices.

    Returns:
        The checkpoint's folder.
    """
    target = folder / f"checkpoint-{state['round']:08d}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".checkpoint-", dir=folder))
    torch.save(state | {"memories": memories.save(fresh)}, fresh / "state.pt")
    for path in fresh.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    fresh.chmod(0o755)
    fresh.rename(target)
    directory = os.open(folder, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    for old in checkpoints(folder)[:-1]:
        shutil.rmtree(old)
    for left in folder.glob(".checkpoint-*"):  # of a run that was killed
        shutil.rmtree(left)
    return target


def read(checkpoint: Path) -> dict[str, Any]:
    """Read the state that `write` wrote, every part of its type.

    Raises:
        ValueError: it can't be read, or something else than that was written; the sentence names the checkpoint.
    """
    try:
        state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its readers of zip files and pickles raise
        raise ValueError(f"the checkpoint '{checkpoint}' can't be read: state.pt: {sentence(error)}") from None
    parts = state if isinstance(state, dict) else {}
    odd = [name for name, kind in _PARTS.items() if type(parts.get(name)) is not kind]
    odd += [] if odd or parts["round"] == int(checkpoint.name[11:]) else ["round"]
    odd += [] if odd or parts["skipped_in_a_row"] >= 0 else ["skipped_in_a_row"]
    if odd:
        raise ValueError(f"the checkpoint '{checkpoint}' is damaged: state.pt has no {odd[0]} as it must be")
    return parts


def restore(checkpoint: Path, world: World, memories: Memories) -> dict[str, Any]:
    """Restore a checkpoint: θ, what the server and the uplink remember, and the memories.

    Args:
        checkpoint: its folder.
        world: of the run, moved in place.
        memories: moved in place.

    Returns:
        The state that was read.

    Raises:
        ValueError: the checkpoint can't be read, or is of another run; the sentence names it.
    """
    state = read(checkpoint)
    for name, now in describe(world).items():
        if state["describes"].get(name) != now:
            was = state["describes"].get(name)
            raise ValueError(f"the checkpoint '{checkpoint}' is of another run: {name} was {was}, now {now}")
    try:
        found = memories.read(checkpoint, state["memories"])
        world.server.load_state(state["server"])
        world.uplink.load_state(state["uplink"], world.training.flat.size)
    except ValueError as error:
        raise ValueError(f"the checkpoint '{checkpoint}' is damaged: {error}") from None
    memories.restore(found)
    return state


def keep_rows(path: Path, number: int) -> None:
    """Rewrite a file of rows without those after a round, and without a line that was cut off."""
    if not path.exists():
        return
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(line_of(row) for row in rows_of(path, {"round": int}) if row["round"] <= number))
    os.replace(fresh, path)


def describe(world: World) -> dict[str, Any]:
    """Describe all that decides what the next round does, by name."""
    rows = hashlib.sha256()
    for part in world.parts:
        rows.update(len(part).to_bytes(8, "little") + part.long().numpy().tobytes())
    return {
        "num_devices": len(world.parts),
        "size": world.training.flat.size,
        "steps": world.training.steps,
        "batch_size": world.training.batch_size,
        "optimizer": described(world.training.optimizer),
        "downlink": described(world.downlink),
        "uplink": described(world.uplink),
        "server_lr": world.server.lr,
        "server_momentum": world.server.momentum,
        "asked": world.asked,
        "late": world.late,
        "seed": world.draws.path[0],
        "devices_at_once": world.devices_at_once,
        "rows of the devices": rows.hexdigest()[:16],
    }


def described(thing: Any) -> str:
    """Describe a link, or what makes an optimizer, by its name and the settings that it was made with."""
    if isinstance(thing, functools.partial):
        settings = [described(each) for each in thing.args]
        settings += [f"{name}={described(value)}" for name, value in thing.keywords.items()]
        return f"{described(thing.func)}({', '.join(settings)})"
    if isinstance(thing, _LINKS):
        held = {name: value for name, value in vars(thing).items() if _is_setting(value)}
        settings = [f"{name}={described(v) if isinstance(v, _LINKS) else repr(v)}" for name, v in held.items()]
        return f"{type(thing).__name__}({', '.join(settings)})"
    return repr(thing) if isinstance(thing, _PLAIN) else getattr(thing, "__qualname__", type(thing).__qualname__)


def _is_setting(value: Any) -> bool:
    """Return whether an attribute of a link is one of its settings, and not what it remembers between rounds."""
    return isinstance(value, (*_PLAIN, *_LINKS, tuple)) or dataclasses.is_dataclass(value)  # such as a channel

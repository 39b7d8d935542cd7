"""Many rounds on one machine: memory, progress, rows, checkpoints, bit-equal resume."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from federated.arguments import chosen, instance, positive, share
from federated.channel import Channel
from federated.device import LocalTraining, saved_bytes
from federated.downlink import Downlink, IdealDownlink, Memory
from federated.draws import Draws
from federated.files import rows_of, sentence
from federated.metrics import Row, evaluate
from federated.round import World, play
from federated.server import Server, check_state
from federated.uplink import IdealUplink, Uplink
from sgc.checks import whole
from sgc.codec import Codec

MOST_AT_ONCE = 256  # devices in one batched call at most: more gain nothing
_SETTINGS = (bool, int, float, str, Channel, Downlink, Uplink, Codec)
_VECTORS_AT_ONCE = 8  # vectors of d numbers that a device in a block needs: θ̂, θ, Δ, gradients, gains, symbols


class Simulation:
    """Play rounds of federated learning over simulated radio links.

    The same seed gives the same run, bit for bit on one machine, also when it was killed and resumed.

    Args:
        training: the model and what every device does with it.
        data: columns (N, …), "labels" among them: the rows of all devices.
        parts: M arrays of rows, one for each device; see `federated.partition`.
        test: columns to evaluate on, or None.
        downlink: server → devices.
        uplink: devices → server.
        server_lr: of the server's step.
        server_momentum: β of FedAvgM; 0: FedAvg.
        asked: devices asked in a round; None: all.
        late: probability that a device misses a round.
        seed: of every random number.
        devices_at_once: in memory together; None: as many as `memory_limit` holds, 256 at most. Sums in another order
            round differently: resume with the same number.
        memory_limit: bytes for the devices of a block; and what is remembered is memory-mapped where it needs more.
        most_skipped: rounds in a row without an update after which the run ends.
        evaluate_every: rounds between evaluations; the last round is evaluated too.
        output_dir: for rows.jsonl, the checkpoint and memory-mapped files; None: nothing is written.
        checkpoint_every: rounds between checkpoints; 0: none.

    Raises:
        ValueError: a number out of range, an empty device, labels missing, or more participants than devices.
        TypeError: a number that is none, or not whole where it must be.
    """

    def __init__(
        self,
        training: LocalTraining,
        data: Mapping[str, Tensor],
        parts: Sequence[np.ndarray[Any, Any] | Tensor],
        *,
        test: Mapping[str, Tensor] | None = None,
        downlink: Downlink | None = None,
        uplink: Uplink | None = None,
        server_lr: float = 1.0,
        server_momentum: float = 0.0,
        asked: int | None = None,
        late: float = 0.0,
        seed: int = 0,
        devices_at_once: int | None = None,
        memory_limit: int = 1 << 30,
        most_skipped: int = 10,
        evaluate_every: int = 1,
        output_dir: str | Path | None = None,
        checkpoint_every: int = 0,
    ) -> None:
        tensors = [torch.as_tensor(part) for part in parts]
        _check(data, tensors)
        if test is not None and "labels" not in test:
            raise ValueError(f"the test data need a column 'labels', got {', '.join(test)}")
        positive("server_lr", server_lr)
        share("server_momentum", server_momentum)
        asked = chosen("asked", asked, len(tensors), whole_of="num_devices")
        late, seed = share("late", late), whole("seed", seed, at_least=0)
        devices_at_once = whole("devices_at_once", devices_at_once, at_least=1, optional=True)
        self.test = test
        self.most_skipped: int = whole("most_skipped", most_skipped, at_least=1)
        self.evaluate_every: int = whole("evaluate_every", evaluate_every, at_least=1)
        self.checkpoint_every: int = whole("checkpoint_every", checkpoint_every, at_least=0)
        self.memory_limit: int = whole("memory_limit", memory_limit, at_least=1)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self._mapped: dict[str, Path] = {}
        self.number, self.skipped_in_a_row, self.ended = 0, 0, ""
        self._whole = True  # no round was left in the middle, with what is remembered half moved
        flat = instance("training", training, LocalTraining).flat
        downlink = IdealDownlink() if downlink is None else instance("downlink", downlink, Downlink)
        uplink = IdealUplink() if uplink is None else instance("uplink", uplink, Uplink)
        theta = flat.read(training.model)
        theta_hat = self._remember("theta_hat", downlink.memory_rows(len(parts)), flat.size)
        if theta_hat is not None:
            for row in theta_hat:  # every device knows where training starts
                row.copy_(theta)
        self.world = World(
            server=Server(theta, lr=server_lr, momentum=server_momentum),
            training=training,
            downlink=downlink,
            uplink=uplink,
            data=data,
            parts=tensors,
            draws=Draws((seed,)),
            theta_hat=theta_hat,
            error=self._remember("error", uplink.memory_rows(len(parts)), flat.size),
            asked=asked,
            late=late,
        )
        self.world.devices_at_once = devices_at_once or self._fitting_devices()

    @property
    def theta(self) -> Tensor:
        """θ (d,)."""
        return self.world.server.theta

    def model(self) -> torch.nn.Module:
        """Give the model with the present θ written into it."""
        self.world.training.flat.write(self.theta, self.world.training.model)
        return self.world.training.model

    def run(self, rounds: int, *, progress: bool = True) -> Iterator[dict[str, Any]]:
        """Play rounds up to number `rounds`, yielding a row for each.

        A row has the fields of `federated.metrics.Row`, "seconds" of the round, and after an evaluation "loss" and
        "accuracy" on the test data. After `most_skipped` rounds in a row without an update the run ends, and `ended`
        says why. A run that is over stays over: it yields nothing.
        """
        if self.skipped_in_a_row < self.most_skipped:  # it may have been raised since
            self.ended = ""
        with tqdm(total=rounds, initial=self.number, desc="rounds", disable=not progress) as bar:
            while self.number < rounds and not self.ended:
                row = self.step(last=self.number + 1 == rounds)
                bar.update()
                bar.set_postfix({k: f"{row[k]:.3f}" for k in ("train_loss", "accuracy") if row.get(k) is not None})
                yield row
            if self.output_dir is not None and self.checkpoint_every:
                self.save()

    def step(self, *, last: bool = False) -> dict[str, Any]:
        """Play one round, evaluate and save where it is time, and give its row."""
        start = time.perf_counter()
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            if not self.number:
                self._clear(self.output_dir)
        self._whole = False
        row = play(self.world, self.number + 1)
        self.number, self._whole = self.number + 1, True
        self._count_skipped(row)
        content = dataclasses.asdict(row) | {"seconds": time.perf_counter() - start}
        try:
            if self.test is not None and (last or self.ended or self.number % self.evaluate_every == 0):
                content |= evaluate(self.model(), self.test)
        finally:  # the round has been played, whatever becomes of its evaluation
            if self.output_dir is not None:
                with open(self.output_dir / "rows.jsonl", "a") as file:
                    file.write(line_of(content))
        if self.output_dir is not None and self.checkpoint_every and self.number % self.checkpoint_every == 0:
            self.save()
        return content

    def evaluate(self) -> dict[str, float]:
        """Measure "loss" and "accuracy" of the present θ on the test data, nothing without those."""
        return {} if self.test is None else evaluate(self.model(), self.test)

    def _clear(self, folder: Path) -> None:
        """Take away what another run has left: its rows and checkpoints are not this one's."""
        (folder / "rows.jsonl").unlink(missing_ok=True)
        for old in [*_checkpoints(folder), *folder.glob(".checkpoint-*")]:
            shutil.rmtree(old)

    def _count_skipped(self, row: Row) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if row.skipped else 0
        if self.skipped_in_a_row >= self.most_skipped:
            self.ended = f"{self.skipped_in_a_row} rounds in a row brought no update, the last because {row.skipped}"

    # ------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> Path:
        """Write everything that the next round depends on, whole or not at all.

        Returns:
            The checkpoint's folder, `checkpoint-N` in `output_dir`.

        Raises:
            RuntimeError: there is no output_dir, or a round was left in the middle: what is remembered is of no round.
        """
        if self.output_dir is None:
            raise RuntimeError("a checkpoint needs an output_dir, got None")
        if not self._whole:
            raise RuntimeError(f"a checkpoint needs a whole round, round {self.number + 1} was interrupted")
        target = self.output_dir / f"checkpoint-{self.number:08d}"
        if target.exists():
            return target
        self.output_dir.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".checkpoint-", dir=self.output_dir))
        memories = {name: memory for name, memory in self._memories().items() if memory is not None}
        torch.save(
            {
                "round": self.number,
                "skipped_in_a_row": self.skipped_in_a_row,
                "ended": self.ended,
                "describes": self._describe(),
                "server": self.world.server.state(),
                "uplink": self.world.uplink.state(),
                "memories": {name: memory for name, memory in memories.items() if name not in self._mapped},
            },
            fresh / "state.pt",
        )
        for name, path in self._mapped.items():
            shutil.copyfile(path, fresh / f"{name}.bin")
        for path in fresh.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        fresh.chmod(0o755)
        fresh.rename(target)
        folder = os.open(self.output_dir, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        for old in _checkpoints(self.output_dir)[:-1]:
            shutil.rmtree(old)
        for left in self.output_dir.glob(".checkpoint-*"):  # of a run that was killed
            shutil.rmtree(left)
        return target

    def resume(self) -> int:
        """Go back to the last checkpoint in `output_dir`; rows of later rounds are taken out of rows.jsonl.

        Returns:
            The number of the round it was made after; 0 where there is none.

        Raises:
            ValueError: the checkpoint can't be read, or it is of another run: model size, devices and their rows, local
                training, links, server or seed differ.
        """
        if self.output_dir is None:
            raise RuntimeError("to resume needs an output_dir, got None")
        found = _checkpoints(self.output_dir)
        if found:
            self._take_back(found[-1])
        else:
            self.number = 0
        _keep_rows(self.output_dir / "rows.jsonl", self.number)
        return self.number

    def last_checkpoint(self) -> Path | None:
        """Return the folder of the last whole checkpoint; None: there is none."""
        return None if self.output_dir is None else next(reversed(_checkpoints(self.output_dir)), None)

    def _take_back(self, checkpoint: Path) -> None:
        state = _read_state(checkpoint)
        for name, now in self._describe().items():
            if state["describes"].get(name) != now:
                was = state["describes"].get(name)
                raise ValueError(f"the checkpoint '{checkpoint}' is of another run: {name} was {was}, now {now}")
        memories = {name: memory for name, memory in self._memories().items() if memory is not None}
        try:
            held = dict(state["memories"])
            for name, memory in memories.items():
                path, size = checkpoint / f"{name}.bin", 4 * memory.numel()
                if path.is_file():
                    if path.stat().st_size != size:
                        raise ValueError(f"{path.name} must have {size} bytes, got {path.stat().st_size}")
                    held[name] = _map(path, memory.shape, write=False)
            check_state(held, {name: memory.shape for name, memory in memories.items()})
            self.world.server.load_state(state["server"])
            self.world.uplink.load_state(state["uplink"], self.world.training.flat.size)
        except ValueError as error:
            raise ValueError(f"the checkpoint '{checkpoint}' is damaged: {error}") from None
        for name, memory in memories.items():
            memory.copy_(held[name])
        self.number, self.skipped_in_a_row, self.ended = state["round"], state["skipped_in_a_row"], state["ended"]

    def _describe(self) -> dict[str, Any]:
        """Name all that decides what the next round does."""
        world = self.world
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

    # ------------------------------------------------------------------------------------------ memory

    def _memories(self) -> dict[str, Memory]:
        return {"theta_hat": self.world.theta_hat, "error": self.world.error}

    def _remember(self, name: str, rows: int, size: int) -> Memory:
        """Make zeros (rows, size), in a file where they are large."""
        if not rows:
            return None
        if 4 * rows * size <= self.memory_limit:
            return torch.zeros(rows, size)
        if self.output_dir is None:
            folder = Path(tempfile.mkdtemp(prefix="federated-"))
            weakref.finalize(self, shutil.rmtree, folder)
        else:
            folder = self.output_dir / "memory"
            folder.mkdir(parents=True, exist_ok=True)
        path = self._mapped[name] = folder / f"{name}.bin"
        with open(path, "wb") as file:
            file.truncate(4 * rows * size)
        return _map(path, torch.Size((rows, size)), write=True)

    def _fitting_devices(self) -> int:
        world = self.world
        largest = max(range(len(world.parts)), key=lambda device: len(world.parts[device]))
        batches = world.training.batches(world.data, world.parts, [largest], world.draws)
        batch = sum(column.numel() * column.element_size() for column in batches.at(0).values())
        vectors = _VECTORS_AT_ONCE * 4 * world.training.flat.size
        each = vectors + 2 * batch + 3 * saved_bytes(world.training, batches)
        return max(1, min(MOST_AT_ONCE, len(world.parts), self.memory_limit // each))


def tensors_of(dataset: Any, columns: Sequence[str]) -> dict[str, Tensor]:
    """Read columns of a `datasets.Dataset` into memory as tensors, of floats as fp32.

    Raises:
        ValueError: a column is missing, or its rows are not of one size.
    """
    out = {}
    for name in columns:
        if name not in dataset.column_names:
            raise ValueError(f"the data have no column {name!r}, only {', '.join(dataset.column_names)}")
        try:
            values = torch.as_tensor(np.asarray(dataset.with_format("numpy")[name][:]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the rows of column {name!r} must be numbers of one shape") from error
        out[name] = values.float() if values.is_floating_point() else values.long()
    return out


def line_of(row: Mapping[str, Any]) -> str:
    """Write a row as a line of JSON, which has no word for what is not finite: null."""
    held = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(held, allow_nan=False) + "\n"


def described(thing: Any) -> str:
    """Name a link, or what makes an optimizer, with the settings that it was made with."""
    if isinstance(thing, functools.partial):
        settings = [described(each) for each in thing.args]
        settings += [f"{name}={described(value)}" for name, value in thing.keywords.items()]
        return f"{described(thing.func)}({', '.join(settings)})"
    if isinstance(thing, Downlink | Uplink | Codec):
        held = {name: value for name, value in vars(thing).items() if isinstance(value, _SETTINGS)}
        return f"{type(thing).__name__}({', '.join(f'{name}={described(value)}' for name, value in held.items())})"
    return repr(thing) if isinstance(thing, _SETTINGS) else getattr(thing, "__qualname__", type(thing).__qualname__)


def _map(path: Path, shape: torch.Size, *, write: bool) -> Tensor:
    return torch.from_file(str(path), shared=write, size=shape.numel(), dtype=torch.float32).view(shape)


def _checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints that are ours, the first round first: other programs name theirs alike."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{8,}", path.name)]
    return sorted((path for path in found if (path / "state.pt").is_file()), key=lambda path: int(path.name[11:]))


_PARTS = {"round": int, "skipped_in_a_row": int, "ended": str, "describes": dict, "server": dict, "uplink": dict,
          "memories": dict}  # fmt: skip


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Read what `Simulation.save` wrote, every part of its type.

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


def _keep_rows(path: Path, number: int) -> None:
    """Rewrite a file of rows without those after a round, and without a line that was cut off."""
    if not path.exists():
        return
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(line_of(row) for row in rows_of(path, {"round": int}) if row["round"] <= number))
    os.replace(fresh, path)


def _check(
    data: Mapping[str, Tensor],
    parts: Sequence[Tensor],
) -> None:
    if "labels" not in data:
        raise ValueError(f"the data need a column 'labels', got {', '.join(data)}")
    rows = len(data["labels"])
    for name, column in data.items():
        if len(column) != rows:
            raise ValueError(f"columns must be of one length, labels has {rows} rows and {name} {len(column)}")
    if not parts:
        raise ValueError("at least one device is needed, got none")
    for device, part in enumerate(parts):
        if not len(part):
            raise ValueError(f"no device may be empty, device {device} of {len(parts)} is")
        if int(part.min()) < 0 or int(part.max()) >= rows:
            raise ValueError(f"rows of device {device} must be in [0, {rows - 1}], got {int(part.max())}")

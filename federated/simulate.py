"""Many rounds on one machine: memory, progress, rows, checkpoints, bit-equal resume."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from federated import checkpoint
from federated.arguments import chosen, instance, positive, share
from federated.device import LocalTraining, saved_bytes
from federated.downlink import Downlink, IdealDownlink
from federated.draws import Draws
from federated.files import line_of
from federated.memory import Memories
from federated.metrics import Row, evaluate
from federated.round import World, play
from federated.server import Server
from federated.uplink import IdealUplink, Uplink
from sgc.checks import whole

MOST_AT_ONCE = 256  # devices in one batched call at most: more gain nothing
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
        ValueError: a number out of range, an empty device, labels missing, or more devices asked than there are.
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
        self.number, self.skipped_in_a_row, self.ended = 0, 0, ""
        self._whole = True  # no round was left in the middle, with what is remembered half moved
        flat = instance("training", training, LocalTraining).flat
        downlink = IdealDownlink() if downlink is None else instance("downlink", downlink, Downlink)
        uplink = IdealUplink() if uplink is None else instance("uplink", uplink, Uplink)
        theta, self._memories = flat.read(training.model), Memories(self.output_dir, self.memory_limit)
        theta_hat = self._memories.zeros("theta_hat", downlink.memory_rows(len(parts)), flat.size)
        for row in () if theta_hat is None else theta_hat:  # every device knows where training starts
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
            error=self._memories.zeros("error", uplink.memory_rows(len(parts)), flat.size),
            asked=asked,
            late=late,
        )
        self.world.devices_at_once = devices_at_once or self._fitting_devices()

    @property
    def theta(self) -> Tensor:
        """θ (d,)."""
        return self.world.server.theta

    def model(self) -> torch.nn.Module:
        """Return the model with the present θ written into it."""
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
        """Play one round, evaluate and save where it is time, and return its row."""
        start = time.perf_counter()
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            if not self.number:
                checkpoint.clear(self.output_dir)
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
        """Measure "loss" and "accuracy" of the present θ on the test data; empty without those."""
        return {} if self.test is None else evaluate(self.model(), self.test)

    def _count_skipped(self, row: Row) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if row.skipped else 0
        if self.skipped_in_a_row >= self.most_skipped:
            self.ended = f"{self.skipped_in_a_row} rounds in a row brought no update, the last because {row.skipped}"

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
        state = {
            "round": self.number,
            "skipped_in_a_row": self.skipped_in_a_row,
            "ended": self.ended,
            "describes": checkpoint.describe(self.world),
            "server": self.world.server.state(),
            "uplink": self.world.uplink.state(),
        }
        return checkpoint.write(self.output_dir, state, self._memories)

    def resume(self) -> int:
        """Restore the last checkpoint in `output_dir`; rows of later rounds are taken out of rows.jsonl.

        Returns:
            The number of the round it was made after; 0 where there is none.

        Raises:
            ValueError: the checkpoint can't be read, or it is of another run: model size, devices and their rows, local
                training, links, server or seed differ.
        """
        if self.output_dir is None:
            raise RuntimeError("to resume needs an output_dir, got None")
        last = self.last_checkpoint()
        if last is None:
            self.number = 0
        else:
            state = checkpoint.restore(last, self.world, self._memories)
            self.number, self.skipped_in_a_row, self.ended = state["round"], state["skipped_in_a_row"], state["ended"]
        checkpoint.keep_rows(self.output_dir / "rows.jsonl", self.number)
        return self.number

    def last_checkpoint(self) -> Path | None:
        """Return the folder of the last whole checkpoint; None: there is none."""
        return None if self.output_dir is None else next(reversed(checkpoint.checkpoints(self.output_dir)), None)

    def _fitting_devices(self) -> int:
        """Count the devices of a block that `memory_limit` holds."""
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


def _check(data: Mapping[str, Tensor], parts: Sequence[Tensor]) -> None:
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

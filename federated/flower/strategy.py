"""The server's side: the wireless systems as a Flower strategy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from federated.arguments import chosen, instance, positive, share
from federated.downlink import Downlink, IdealDownlink, Memory
from federated.draws import Draws
from federated.flower.nodes import LOG, Nodes, wait_for_nodes
from federated.flower.records import arrays, count_of, printable, reason_of, record_of, tensor_of
from federated.metrics import Row
from federated.round import Round, Station
from federated.server import Server
from federated.uplink import Encoded, IdealUplink, Uplink
from sgc.checks import whole

MOST_SAMPLES = 2**53  # rows that a device may say it has
MOST_BITS = 2**40  # bits that a device may say it sent


@dataclass(frozen=True)
class Update:
    """What a device answers, checked; `UplinkRound.hear` finds out whether it can be added up.

    Args:
        samples: B_m.
        loss: of its local training.
        encoded: what it sends; None: it says that it has nothing sound to send.
        bytes_up: that travelled.
    """

    samples: int
    loss: float
    encoded: Encoded | None
    bytes_up: int

    @classmethod
    def read(cls, content: RecordDict, device: int) -> Update:
        """Read the reply of the node that was asked as a device.

        Raises:
            ValueError: a number or tensor that is missing, of another type or out of range.
        """
        metrics = record_of(content, "metrics", MetricRecord)
        found = count_of(metrics, "device", 0, 2**63 - 1)
        if found != device:
            raise ValueError(f"device must be {device}, as which the node was asked, got {found}")
        samples = count_of(metrics, "samples", 1, MOST_SAMPLES)
        if not count_of(metrics, "finite", 0, 1):
            return cls(samples, math.nan, None, 0)
        loss = metrics.get("loss")
        if not isinstance(loss, int | float) or not math.isfinite(loss):
            raise ValueError(f"loss must be a finite number, got {printable(loss)}")
        able, bits = count_of(metrics, "able", 0, 1), count_of(metrics, "bits", -1, MOST_BITS)
        up = record_of(content, "up", ArrayRecord)
        try:
            payload = tensor_of(up, "payload")
        except Exception as error:  # a stranger's bytes: whatever numpy's reader and torch raise
            raise ValueError(f"payload must be an array of numbers: {printable(error)}") from None
        encoded = Encoded(payload[None], None, torch.tensor([bool(able)]), None if bits < 0 else bits)
        return cls(samples, float(loss), encoded, up.count_bytes())


class RadioStrategy(Strategy):
    """The server of the wireless systems as a Flower strategy.

    No reply is trusted: one that makes no sense, or can't be added up, is left out. The metrics count, of the devices
    that the downlink served, the participants, those dropped for that, those failed (an error on the node) and those
    late (no answer); `left_out` and Flower's log give the reason of each. A node that joins later, or comes back with
    another id, takes part from the next round on.

    Args:
        num_devices: M; training starts when so many nodes are there.
        downlink: server → devices; default ideal.
        uplink: devices → server; default ideal.
        asked: devices asked in a round; None: all.
        server_lr: of the server's step.
        server_momentum: β.
        seed: of every random number.
        timeout: seconds to wait for the nodes.
        on_round: called with (round, metrics) after every round.

    Raises:
        ValueError: a number out of range, or more devices asked than there are.
        TypeError: a number that is none, or not whole where it must be.
    """

    def __init__(
        self,
        num_devices: int,
        *,
        downlink: Downlink | None = None,
        uplink: Uplink | None = None,
        asked: int | None = None,
        server_lr: float = 1.0,
        server_momentum: float = 0.0,
        seed: int = 0,
        timeout: float = 300.0,
        on_round: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.num_devices: int = whole("num_devices", num_devices, at_least=1)
        self.asked = chosen("asked", asked, self.num_devices, whole_of="num_devices")
        self.seed: int = whole("seed", seed, at_least=0)
        self.timeout = positive("timeout", timeout)
        self.downlink = IdealDownlink() if downlink is None else instance("downlink", downlink, Downlink)
        self.uplink = IdealUplink() if uplink is None else instance("uplink", uplink, Uplink)
        self.server_lr = positive("server_lr", server_lr)
        self.server_momentum = share("server_momentum", server_momentum)
        self.on_round = on_round
        self.nodes = Nodes(self.num_devices, self.timeout)
        self.left_out: dict[int, str] = {}  # device → why, in the last round; who was late is not in it
        self.station: Station | None = None  # from the first round on, which brings θ
        self._round: Round | None = None
        self._told: set[int] = set()  # devices that know their θ̂_m
        self._messaged: set[int] = set()
        self._silent: set[int] = set()  # devices that did not answer when they were asked last

    @property
    def theta_hat(self) -> Memory:
        """What the downlink remembers, (1 or M, d), if anything."""
        return None if self.station is None else self.station.theta_hat

    def summary(self) -> None:
        """Write nothing: the rounds' metrics are the summary."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send θ down the downlink: one message for each device that is served or listens."""
        if self.station is None:
            wait_for_nodes(grid, self.num_devices, "nodes", self.timeout)
            self.station = self._begin(tensor_of(arrays, "theta"))
        self._told -= self.nodes.meet(grid, self._silent)
        start = None if self.theta_hat is None else self.theta_hat.clone()
        here = self._round = Round(self.station, server_round)
        served = set(here.down.devices.tolist())
        self._messaged = served | set(here.down.messages) if served else set()
        messages = []
        for device in sorted(self._messaged & self.nodes.of.keys()):
            one = torch.tensor([device])
            budget = here.up.budget(one)[0] if device in served else 0.0
            settings: Any = {"seed": self.seed, "round": server_round, "budget": budget, "train": device in served}
            record = RecordDict({"down": self._content(here, device, start), "config": ConfigRecord(settings)})
            messages.append(Message(record, self.nodes.of[device], MessageType.TRAIN))
        return messages

    def _begin(self, theta: Tensor) -> Station:
        rows = self.downlink.memory_rows(self.num_devices)
        return Station(
            server=Server(theta, lr=self.server_lr, momentum=self.server_momentum),
            downlink=self.downlink,
            uplink=self.uplink,
            num_devices=self.num_devices,
            draws=Draws((self.seed,)),
            theta_hat=theta.repeat(rows, 1) if rows else None,
            asked=self.asked,
        )

    def _content(self, here: Round, device: int, start: Memory) -> ArrayRecord:
        """Make what travels to a device."""
        message = here.down.messages.get(device)
        if message is None:
            return arrays(theta=here.down.receive(torch.tensor([device]))[0])
        travels = {"value": message.value} | ({} if message.index is None else {"index": message.index})
        if device not in self._told:  # the radio's devices know where training starts, a node is told
            assert start is not None
            travels["theta"] = start[device if len(start) > 1 else 0]
            self._told.add(device)
        return arrays(**travels)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Bring the replies together on the uplink, and move θ by what the server hears."""
        here = self._round
        assert here is not None
        served, answers = set(here.down.devices.tolist()), self._answers(replies)
        self._silent = self._messaged - answers.keys()
        failed = {device for device, reply in answers.items() if not reply.has_content()}
        # who did not answer may not have heard: it is told all of its θ̂_m the next time
        self._told -= self._silent | failed
        self.left_out = {device: f"its node failed: {reason_of(answers[device])}" for device in sorted(failed)}
        answered = sorted(served & answers.keys() - failed)
        heard = self._hear(here, {device: answers[device].content for device in answered})
        late, dropped = sorted(served & self._silent), served & self.left_out.keys() - failed
        for device, why in self.left_out.items():
            LOG.warning("round %d: device %d is left out: %s", server_round, device, why)
        if late:
            LOG.info("round %d: devices %s did not answer", server_round, late)
        losses = torch.tensor([update.loss for update in heard], dtype=torch.float64)
        here.tally.count(losses, late=len(late), dropped=len(dropped), failed=len(served & failed))
        metrics = _metrics(here.close(), here.tally.failed, heard)
        if self.on_round is not None:
            self.on_round(server_round, metrics)
        return arrays(theta=here.station.server.theta), MetricRecord(metrics)

    def _answers(self, replies: Iterable[Message]) -> dict[int, Message]:
        """Find each device's answer: the first one of the node that was asked."""
        devices = {self.nodes.of[device]: device for device in self._messaged & self.nodes.of.keys()}
        answers: dict[int, Message] = {}
        for reply in replies:
            device = devices.pop(reply.metadata.src_node_id, None)
            if device is None:
                LOG.warning("node %d answers unasked, or a second time", reply.metadata.src_node_id)
            else:
                answers[device] = reply
        return answers

    def _hear(self, here: Round, contents: dict[int, RecordDict]) -> list[Update]:
        """Add the devices' updates up on the uplink; `left_out` gets those that can't be."""
        heard = []
        for device, content in contents.items():
            one = torch.tensor([device])
            try:
                update = Update.read(content, device)
                weight = torch.tensor([float(update.samples)])
                if update.encoded is None or not here.up.hear(one, update.encoded, weight).all():
                    raise ValueError("its update is not finite, or too large to be added up")
            except ValueError as error:
                self.left_out[device] = str(error)
                continue
            heard.append(update)
        return heard

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask no device: pass `evaluate_fn` to `start` to evaluate on the server."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing: no device was asked."""
        return None


def _metrics(row: Row, failed: int, heard: list[Update]) -> dict[str, Any]:
    """Make Flower's metrics of a round's row: numbers alone, −1 bits where nothing is coded."""
    metrics: dict[str, Any] = {
        "participants": row.participants,
        "dropped": row.dropped,
        "failed": failed,
        "late": row.late,
        "bits_down": -1 if row.bits_down is None else row.bits_down,
        "channel_uses_down": row.channel_uses_down,
    }
    if heard:
        metrics |= {
            "train_loss": row.train_loss,
            "bytes_up": sum(update.bytes_up for update in heard),
            "bits_up": -1 if row.bits_up is None else row.bits_up,
            "channel_uses_up": row.channel_uses_up,
            "power_up": row.power_up,
        }
    return metrics | {"skipped": int(bool(row.skipped))}

"""The same round on Flower, for devices that are machines of their own (or Ray actors).

| here | on Flower |
|---|---|
| downlink | `Strategy.configure_train` on the server; the client mod `receive`, which makes θ̂_m of what travelled |
| local training | the ClientApp's train function, the simulator's own |
| uplink | the client mod `Transmit`, which makes what travels of Δ_m; `Strategy.aggregate_train` on the server |
| what a device remembers, θ̂_m and e_m | `Context.state` |

What travels is what the scheme sends: a quantized difference as its entries, an update as its sketch. The radio itself
(gains, noise, superposition) is simulated where all signals meet, on the server, with the simulator's random numbers; a
round gives the simulator's numbers up to the order of sums.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    from flwr.app import (
        Array,
        ArrayRecord,
        ConfigRecord,
        Context,
        Message,
        MessageType,
        MetricRecord,
        RecordDict,
    )
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Strategy
except ImportError as error:
    raise ImportError("federated.flower needs Flower: pip install 'sgc[federated]' on Python 3.11 or newer") from error

from federated.arguments import chosen, instance, positive, share
from federated.device import Batch, LocalTraining, draw_batches
from federated.downlink import Downlink, DownlinkRound, IdealDownlink, Memory
from federated.draws import Draws
from federated.quantize import Quantized
from federated.server import Server, sample, sound
from federated.uplink import Encoded, IdealUplink, Uplink, UplinkRound
from sgc.checks import whole

QUERY = MessageType.QUERY
TRAIN = MessageType.TRAIN
MOST_SAMPLES = 2**53  # rows that a device may say it has
MOST_BITS = 2**40  # bits that a device may say it sent
MOST_TEXT = 300  # characters of a stranger's sentence that are passed on
LOG = getLogger("flwr.federated")  # below Flower's own, which prints


def arrays(**tensors: Tensor) -> ArrayRecord:
    """Make a record of tensors by name."""
    return ArrayRecord({name: Array(tensor.detach().contiguous().numpy()) for name, tensor in tensors.items()})


def tensor_of(record: Any, name: str) -> Tensor:
    """Read a tensor of a record, as a copy."""
    return torch.from_numpy(np.array(record[name].numpy()))


# ------------------------------------------------------------------------------------------ the device's side


@dataclass(frozen=True)
class Device:
    """What a machine has.

    Args:
        number: m.
        training: how it trains.
        data: columns of its own rows (B_m, …).
    """

    number: int
    training: LocalTraining
    data: Batch

    @property
    def samples(self) -> int:
        """B_m."""
        return len(self.data["labels"])


def receive(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Turn what travelled into θ̂_m: a client mod for the downlink.

    A digital link's message moves the θ̂_m in `Context.state`; any other's is the estimate itself.

    Raises:
        ValueError: no estimate can be made of it; the one in `Context.state` stays.
    """
    if message.metadata.message_type == TRAIN:
        down = message.content["down"]
        if "theta" in down:  # the estimate itself, or where training starts
            theta_hat = tensor_of(down, "theta")
        elif "theta_hat" in context.state:
            theta_hat = tensor_of(context.state["theta_hat"], "theta_hat")
        else:
            raise ValueError("a difference must come to a node that holds an estimate, this one holds none")
        if theta_hat.ndim != 1 or theta_hat.dtype != torch.float32:
            raise ValueError(f"theta must be (d,) in float32, got {theta_hat.dtype} {tuple(theta_hat.shape)}")
        if "value" in down:
            value, index = tensor_of(down, "value"), tensor_of(down, "index") if "index" in down else None
            theta_hat += _difference(value, index, len(theta_hat))
            if not theta_hat.isfinite().all():
                raise ValueError("the estimate must be finite, got NaN or infinity")
            context.state["theta_hat"] = arrays(theta_hat=theta_hat)
        message.content["down"] = arrays(theta_hat=theta_hat)
        if not message.content["config"]["train"]:
            return Message(RecordDict(), reply_to=message)
    return call_next(message, context)


def _difference(value: Tensor, index: Tensor | None, size: int) -> Tensor:
    """Give what a quantized difference moves (d,) by."""
    places = torch.arange(size) if index is None else index
    if value.dtype != torch.float32 or places.dtype != torch.int64 or value.shape != places.shape or value.ndim != 1:
        raise ValueError(
            f"a difference must be float32 numbers with int64 positions, got {value.dtype} {tuple(value.shape)} with "
            f"{places.dtype} {tuple(places.shape)}"
        )
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < size:
        raise ValueError(f"positions must be in [0, {size}), got {int(places.min())} to {int(places.max())}")
    return Quantized(value, index, size, 1, 0).dense()


class Transmit:
    """Turn Δ_m into what travels: a client mod for the uplink. e_m lies in `Context.state`.

    Args:
        open_uplink: makes, from a node's context, the uplink whose devices' part is done here.
    """

    def __init__(self, open_uplink: Callable[[Context], Uplink]) -> None:
        self.open_uplink = open_uplink

    def __call__(self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        """Encode the reply's update."""
        reply = call_next(message, context)
        if message.metadata.message_type != TRAIN or "up" not in reply.content:
            return reply
        metrics, config = _fields(reply, "metrics"), _fields(message, "config")
        update = tensor_of(reply.content["up"], "update")[None]
        weight = torch.tensor([float(metrics["samples"])])
        if not (sound(update, weight).all() and math.isfinite(metrics["loss"])):
            metrics["finite"] = 0
            del reply.content["up"]
            return reply
        held, uplink = None, self.open_uplink(context)
        if uplink.memory_rows(1):
            known = context.state.array_records.get("error")
            held = torch.zeros_like(update) if known is None else tensor_of(known, "error")[None]
        device = torch.tensor([int(metrics["device"])])
        draws = _draws(config).at("up")
        encoded = uplink.encode(device, update, held, [float(config["budget"])], draws)
        if encoded.held is not None and held is not None:
            context.state["error"] = arrays(error=encoded.held[0])
        metrics["able"], metrics["bits"] = int(encoded.able[0]), -1 if encoded.bits is None else encoded.bits
        reply.content["up"] = arrays(payload=encoded.payload[0])
        return reply


def client_app(
    open_device: Callable[[Context], Device], open_uplink: Callable[[Context], Uplink] | None = None
) -> ClientApp:
    """Make the ClientApp of a device.

    Args:
        open_device: makes a machine's `Device` from its context, whose node_config says which it is.
        open_uplink: makes the uplink, as on the server; default ideal.
    """
    app = ClientApp(mods=[receive, Transmit(open_uplink or (lambda context: IdealUplink()))])

    @app.query()
    def who(message: Message, context: Context) -> Message:
        device = open_device(context)
        metrics = MetricRecord({"device": device.number, "samples": device.samples})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        device, config = open_device(context), _fields(message, "config")
        training = device.training
        rows = torch.arange(device.samples)
        batches = draw_batches(
            device.data, [rows], training.steps, training.batch_size, [device.number], _draws(config)
        )
        theta_hat = tensor_of(message.content["down"], "theta_hat")[None]
        update, loss = training.updates(theta_hat, batches)  # Δ_m = θ_m^(τ) − θ̂_m
        metrics = MetricRecord(
            {"device": device.number, "samples": device.samples, "loss": float(loss[0]), "finite": 1}
        )
        return Message(RecordDict({"up": arrays(update=update[0]), "metrics": metrics}), reply_to=message)

    return app


def _fields(message: Message, name: str) -> Any:
    """Give a record of metrics or settings, by whose names numbers are read."""
    return message.content[name]


def _draws(config: Any) -> Draws:
    return Draws((int(config["seed"]),)).at("round", int(config["round"]))


# ------------------------------------------------------------------------------------------ the server's side


@dataclass(frozen=True)
class Update:
    """What a device answers, checked; whether it can be added up is for `UplinkRound.hear` to say.

    Args:
        samples: B_m.
        loss: of its local training.
        encoded: what it sends; None: it says that it has nothing sound to send.
        size: bytes that travelled.
    """

    samples: int
    loss: float
    encoded: Encoded | None
    size: int

    @classmethod
    def read(cls, content: RecordDict, device: int) -> Update:
        """Read the reply of the node that was asked as a device.

        Raises:
            ValueError: a number or tensor that is missing, of another type or out of range.
        """
        metrics = _record(content, "metrics", MetricRecord)
        found = _count(metrics, "device", 0, 2**63 - 1)
        if found != device:
            raise ValueError(f"device must be {device}, as which the node was asked, got {found}")
        samples = _count(metrics, "samples", 1, MOST_SAMPLES)
        if not _count(metrics, "finite", 0, 1):
            return cls(samples, math.nan, None, 0)
        loss = metrics.get("loss")
        if not isinstance(loss, int | float) or not math.isfinite(loss):
            raise ValueError(f"loss must be a finite number, got {_shown(loss)}")
        able, bits = _count(metrics, "able", 0, 1), _count(metrics, "bits", -1, MOST_BITS)
        up = _record(content, "up", ArrayRecord)
        try:
            payload = tensor_of(up, "payload")
        except Exception as error:  # a stranger's bytes: whatever numpy's reader and torch raise
            raise ValueError(f"payload must be an array of numbers: {_shown(error)}") from None
        encoded = Encoded(payload[None], None, torch.tensor([bool(able)]), None if bits < 0 else bits)
        return cls(samples, float(loss), encoded, up.count_bytes())


def _record(content: RecordDict, name: str, kind: type) -> Any:
    record = content.get(name)
    if not isinstance(record, kind):
        raise ValueError(f"{name} must be a {kind.__name__}, got {type(record).__name__}")
    return record


def _count(metrics: Any, name: str, least: int, most: int) -> int:
    value = metrics.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be a whole number in [{least}, {most}], got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """Show what a stranger sent: on one line, short, and nothing that a terminal obeys."""
    text = " ".join(str(value).split())[:MOST_TEXT]
    return "".join(c if c.isprintable() else "?" for c in text)


class RadioStrategy(Strategy):
    """The server of the wireless systems as a Flower strategy.

    No reply is trusted: one that makes no sense, or can't be added up, is left out. The metrics count, of the devices
    that were asked, the participants, those dropped for that, those failed (an error on the node) and those late (no
    answer); `left_out` and Flower's log say why of each. A node that joins later, or comes back with another id, takes
    part from the next round on.

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
        ValueError: a number out of range, or more participants than devices.
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
        self.server_lr, self.server_momentum = (
            positive("server_lr", server_lr),
            share("server_momentum", server_momentum),
        )
        self.on_round = on_round
        self.nodes: dict[int, int] = {}  # device → node
        self.left_out: dict[int, str] = {}  # device → why, in the last round; who was late is not in it
        self._says: dict[int, int] = {}  # node → device, as it says
        self.server: Server | None = None
        self.theta_hat: Memory = None
        self._told: set[int] = set()  # devices that know their θ̂_m
        self._messaged: set[int] = set()
        self._silent: set[int] = set()  # devices that did not answer when they were asked last
        self._down: DownlinkRound | None = None
        self._up: UplinkRound | None = None

    def summary(self) -> None:
        """Say nothing: the rounds' metrics say it."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send θ down the downlink: one message for each device that takes part or listens."""
        if self.server is None:
            wait_for_nodes(grid, self.num_devices, "nodes", self.timeout)
            self._start(tensor_of(arrays, "theta"))
        assert self.server is not None
        self._meet(grid)
        theta, draws = self.server.theta, Draws((self.seed,)).at("round", server_round)
        start = None if self.theta_hat is None else self.theta_hat.clone()
        asked = sample(self.num_devices, self.asked, draws)
        self._down = self.downlink.send(theta, asked, self.num_devices, self.theta_hat, draws.at("down"))
        self._up = None
        if not len(self._down.devices):
            return []
        self._up = self.uplink.open(len(theta), len(self._down.devices), None, draws.at("up"))
        taking_part = set(self._down.devices.tolist())
        self._messaged = taking_part | set(self._down.messages)
        messages = []
        for device in sorted(self._messaged & self.nodes.keys()):
            one = torch.tensor([device])
            content = self._content(device, one, start)
            budget = self._up.budget(one)[0] if device in taking_part else 0.0
            settings: Any = {"seed": self.seed, "round": server_round, "budget": budget, "train": device in taking_part}
            record = RecordDict({"down": content, "config": ConfigRecord(settings)})
            messages.append(Message(record, self.nodes[device], TRAIN))
        return messages

    def _content(self, device: int, one: Tensor, start: Memory) -> ArrayRecord:
        """Write down what travels to a device."""
        assert self._down is not None
        message = self._down.messages.get(device)
        if message is None:
            return arrays(theta=self._down.receive(one)[0])
        travels = {"value": message.value} | ({} if message.index is None else {"index": message.index})
        if device not in self._told:  # the radio's devices know where training starts, a node is told
            assert start is not None
            travels["theta"] = start[device if len(start) > 1 else 0]
            self._told.add(device)
        return arrays(**travels)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the replies meet on the uplink, and move θ by what the server hears."""
        assert self.server is not None
        assert self._down is not None
        asked, answers = set(self._down.devices.tolist()), self._answers(replies)
        self._silent = self._messaged - answers.keys()
        failed = {device for device, reply in answers.items() if not reply.has_content()}
        # who did not answer may not have heard: it is told all of its θ̂_m the next time
        self._told -= self._silent | failed
        self.left_out = {device: f"its node failed: {_reason(answers[device])}" for device in sorted(failed)}
        heard: dict[int, Update] = {}
        for device in sorted(asked & answers.keys() - failed):
            content = answers[device].content
            try:
                heard[device] = self._hear(device, content)
            except ValueError as error:
                self.left_out[device] = str(error)
        for device, why in self.left_out.items():
            LOG.warning("round %d: device %d is left out: %s", server_round, device, why)
        if late := sorted(asked & self._silent):
            LOG.info("round %d: devices %s did not answer", server_round, late)
        bits_down = self._down.traffic.bits
        metrics: Any = {
            "participants": len(heard),
            "dropped": len(asked & self.left_out.keys() - failed),
            "failed": len(asked & failed),
            "late": len(late),
            "bits_down": -1 if bits_down is None else bits_down,
            "channel_uses_down": self._down.traffic.channel_uses,
        }
        estimate = None
        if self._up is not None and heard:
            estimate = self._up.receive()
            metrics |= {
                "train_loss": float(np.mean([update.loss for update in heard.values()])),
                "bytes_up": sum(update.size for update in heard.values()),
                "bits_up": -1 if self._up.traffic.bits is None else self._up.traffic.bits,
                "channel_uses_up": self._up.traffic.channel_uses,
                "power_up": self._up.traffic.power,
            }
        metrics["skipped"] = int(estimate is None or not self.server.step(estimate))
        if self.on_round is not None:
            self.on_round(server_round, metrics)
        return arrays(theta=self.server.theta), MetricRecord(metrics)

    def _answers(self, replies: Iterable[Message]) -> dict[int, Message]:
        """Find each device's answer: the first one of the node that was asked."""
        devices = {self.nodes[device]: device for device in self._messaged & self.nodes.keys()}
        answers: dict[int, Message] = {}
        for reply in replies:
            device = devices.pop(reply.metadata.src_node_id, None)
            if device is None:
                LOG.warning("node %d answers unasked, or a second time", reply.metadata.src_node_id)
            else:
                answers[device] = reply
        return answers

    def _hear(self, device: int, content: RecordDict) -> Update:
        """Let a device's update meet the others on the uplink; raises ValueError where it can't."""
        assert self._up is not None
        update = Update.read(content, device)
        weight = torch.tensor([float(update.samples)])
        if update.encoded is None or not self._up.hear(torch.tensor([device]), update.encoded, weight).all():
            raise ValueError("its update is not finite, or too large to be added up")
        return update

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask no device: pass `evaluate_fn` to `start` to evaluate on the server."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing was asked."""
        return None

    def _start(self, theta: Tensor) -> None:
        self.server = Server(theta, lr=self.server_lr, momentum=self.server_momentum)
        rows = self.downlink.memory_rows(self.num_devices)
        self.theta_hat = theta.repeat(rows, 1) if rows else None

    def _meet(self, grid: Grid) -> None:
        """Ask the nodes that are new which device they are, and settle which node is which device.

        A device stays with its node while that is there and answers, so that nobody takes its place.

        Raises:
            RuntimeError: no node is a device.
        """
        there = list(grid.get_node_ids())
        new = [node for node in there if node not in self._says]
        questions = [Message(RecordDict(), node, QUERY) for node in new]
        for reply in grid.send_and_receive(questions, timeout=self.timeout) if new else ():
            node = reply.metadata.src_node_id
            try:
                if not reply.has_content():
                    raise ValueError(_reason(reply))
                metrics = _record(reply.content, "metrics", MetricRecord)
                self._says[node] = _count(metrics, "device", 0, self.num_devices - 1)
            except ValueError as error:
                LOG.warning("node %d is no device of this run: %s", node, error)
        missing = []
        for device in range(self.num_devices):
            found = [node for node, number in self._says.items() if number == device and node in there]
            before = self.nodes.pop(device, None)
            now = before if before is not None or not found else found[0]
            if now not in found or device in self._silent:  # the youngest other one, if there is one
                now = next((node for node in reversed(found) if node != now), now if now in found else None)
            if now is None:
                missing.append(device)
                continue
            if now != before:
                self._told.discard(device)  # another node remembers nothing
            self.nodes[device] = now
            for node in set(found) & set(new) - {now}:
                LOG.warning("node %d says that it is device %d, which node %d is", node, device, now)
        if not self.nodes:
            raise RuntimeError(f"the nodes must be devices 0 to {self.num_devices - 1}, none of {len(there)} is")
        if missing:
            LOG.warning("devices %s have no node, and are late until one comes", missing)


def _reason(reply: Message) -> str:
    """Say what an error on a node was."""
    return _shown(reply.error.reason or f"error {reply.error.code}")


def wait_for_nodes(grid: Grid, count: int, what: str, timeout: float) -> list[int]:
    """Give the ids of all nodes as soon as there are `count` of them.

    Raises:
        RuntimeError: fewer came within `timeout` seconds; `what` is what the sentence calls them.
    """
    end = time.monotonic() + timeout
    while len(found := list(grid.get_node_ids())) < count:
        if time.monotonic() > end:
            raise RuntimeError(f"{count} {what} are needed, {len(found)} came in {timeout:.0f} s")
        time.sleep(0.2)  # a Grid has no call that waits for nodes
    return found

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

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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

from federated.device import Batch, LocalTraining, draw_batches
from federated.downlink import Downlink, IdealDownlink, Memory, Reception
from federated.draws import Draws
from federated.quantize import Quantized
from federated.server import Server, sample
from federated.uplink import Encoded, IdealUplink, Superposition, Uplink

QUERY = MessageType.QUERY
TRAIN = MessageType.TRAIN


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
    """
    if message.metadata.message_type == TRAIN:
        down = message.content["down"]
        if "theta" in down:  # the estimate itself, or where training starts
            theta_hat = tensor_of(down, "theta")
        else:
            theta_hat = tensor_of(context.state["theta_hat"], "theta_hat")
        if "value" in down:
            value, index = tensor_of(down, "value"), tensor_of(down, "index") if "index" in down else None
            theta_hat += Quantized(value, index, len(theta_hat), 1, 0).dense()
            context.state["theta_hat"] = arrays(theta_hat=theta_hat)
        message.content["down"] = arrays(theta_hat=theta_hat)
        if not message.content["config"]["train"]:
            return Message(RecordDict(), reply_to=message)
    return call_next(message, context)


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
        if not update.isfinite().all():
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


def _number(metrics: Any) -> int:
    """Read which device a reply is of."""
    return int(metrics["device"])


def _draws(config: Any) -> Draws:
    return Draws((int(config["seed"]),)).at("round", int(config["round"]))


# ------------------------------------------------------------------------------------------ the server's side


class RadioStrategy(Strategy):
    """The server of the wireless systems as a Flower strategy.

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
        ValueError: more participants than devices.
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
        if asked is not None and not 1 <= asked <= num_devices:
            raise ValueError(f"participants must be in [1, num_devices={num_devices}], got {asked}")
        self.num_devices, self.asked, self.seed, self.timeout = num_devices, asked, seed, timeout
        self.downlink, self.uplink = downlink or IdealDownlink(), uplink or IdealUplink()
        self.server_lr, self.server_momentum, self.on_round = server_lr, server_momentum, on_round
        self.nodes: dict[int, int] = {}  # device → node
        self.server: Server | None = None
        self.theta_hat: Memory = None
        self._told: set[int] = set()  # devices that know their θ̂_m
        self._messaged: set[int] = set()
        self._down: Reception | None = None
        self._up: Superposition | None = None

    def summary(self) -> None:
        """Say nothing: the rounds' metrics say it."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send θ down the downlink: one message for each device that takes part or listens."""
        if self.server is None:
            self._register(grid)
            self._start(tensor_of(arrays, "theta"))
        assert self.server is not None
        theta, draws = self.server.theta, Draws((self.seed,)).at("round", server_round)
        start = None if self.theta_hat is None else self.theta_hat.clone()
        asked = sample(self.num_devices, self.asked, draws)
        self._down = self.downlink.send(theta, asked, self.num_devices, self.theta_hat, draws.at("down"))
        if not len(self._down.devices):
            self._up = None
            return []
        self._up = self.uplink.open(len(theta), len(self._down.devices), None, draws.at("up"))
        taking_part = set(self._down.devices.tolist())
        self._messaged = taking_part | set(self._down.messages)
        messages = []
        for device in sorted(self._messaged):
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
        answered = [reply for reply in replies if reply.has_content()]
        nodes = {reply.metadata.src_node_id for reply in answered}
        # who did not answer may not have heard: it is told all of its θ̂_m the next time
        self._told = {device for device in self._told if self.nodes[device] in nodes or device not in self._messaged}
        heard = [reply.content for reply in answered if "metrics" in reply.content]
        heard.sort(key=lambda content: _number(content["metrics"]))
        sent = [content for content in heard if content["metrics"]["finite"]]
        bits_down = self._down.traffic.bits
        metrics: Any = {
            "participants": len(sent),
            "dropped": len(heard) - len(sent),
            "late": len(self._down.devices) - len(heard),
            "bits_down": -1 if bits_down is None else bits_down,
            "channel_uses_down": self._down.traffic.channel_uses,
        }
        estimate = None
        if self._up is not None and sent:
            for content in sent:
                self._hear(content)
            estimate = self._up.receive()
            metrics |= {
                "train_loss": float(np.mean([content["metrics"]["loss"] for content in sent])),
                "bytes_up": sum(content["up"].count_bytes() for content in sent),
                "bits_up": -1 if self._up.traffic.bits is None else self._up.traffic.bits,
                "channel_uses_up": self._up.traffic.channel_uses,
                "power_up": self._up.traffic.power,
            }
        metrics["skipped"] = int(estimate is None)
        if estimate is not None:
            self.server.step(estimate)
        if self.on_round is not None:
            self.on_round(server_round, metrics)
        return arrays(theta=self.server.theta), MetricRecord(metrics)

    def _hear(self, content: RecordDict) -> None:
        assert self._up is not None
        metrics: Any = content["metrics"]
        encoded = Encoded(
            tensor_of(content["up"], "payload")[None],
            None,
            torch.tensor([bool(metrics["able"])]),
            None if metrics["bits"] < 0 else int(metrics["bits"]),
        )
        self._up.hear(torch.tensor([int(metrics["device"])]), encoded, torch.tensor([float(metrics["samples"])]))

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

    def _register(self, grid: Grid) -> None:
        """Wait for M nodes and ask each which device it is.

        Raises:
            RuntimeError: they did not come in time, or two of them say they are the same device.
        """
        found = wait_for_nodes(grid, self.num_devices, "nodes", self.timeout)
        replies = grid.send_and_receive([Message(RecordDict(), node, QUERY) for node in found], timeout=self.timeout)
        for reply in replies:
            if reply.has_content():
                self.nodes[_number(reply.content["metrics"])] = reply.metadata.src_node_id
        if sorted(self.nodes) != list(range(self.num_devices)):
            raise RuntimeError(f"the nodes must be devices 0 to {self.num_devices - 1}, they are {sorted(self.nodes)}")


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

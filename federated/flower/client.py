"""The device's side: what it makes of what travelled, how it trains, and what travels back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from flwr.app import Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from federated.device import Batch, LocalTraining, draw_batches
from federated.flower.records import arrays, draws_of, fields_of, tensor_of
from federated.quantize import Quantized
from federated.server import sound
from federated.uplink import IdealUplink, Uplink

Handler = Callable[[Message, Context], Message]


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


def receive(message: Message, context: Context, call_next: Handler) -> Message:
    """Make θ̂_m of what travelled: a client mod for the downlink.

    A digital link's message moves the θ̂_m in `Context.state`; any other's is the estimate itself.

    Raises:
        ValueError: no estimate can be made of it; the one in `Context.state` stays.
    """
    if message.metadata.message_type == MessageType.TRAIN:
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
    """Check a quantized difference, and write it out (d,)."""
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
    """Make what travels of Δ_m: a client mod for the uplink. e_m lies in `Context.state`.

    Args:
        open_uplink: makes, from a node's context, the uplink whose devices' part is done here.
    """

    def __init__(self, open_uplink: Callable[[Context], Uplink]) -> None:
        self.open_uplink = open_uplink

    def __call__(self, message: Message, context: Context, call_next: Handler) -> Message:
        """Encode the reply's update."""
        reply = call_next(message, context)
        if message.metadata.message_type != MessageType.TRAIN or "up" not in reply.content:
            return reply
        metrics, config = fields_of(reply, "metrics"), fields_of(message, "config")
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
        encoded = uplink.encode(device, update, held, [float(config["budget"])], draws_of(config).at("up"))
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
        device, draws = open_device(context), draws_of(fields_of(message, "config"))
        training, rows = device.training, torch.arange(device.samples)
        batches = draw_batches(device.data, [rows], training.steps, training.batch_size, [device.number], draws)
        theta_hat = tensor_of(message.content["down"], "theta_hat")[None]
        update, loss = training.updates(theta_hat, batches)  # Δ_m = θ_m^(τ) − θ̂_m
        metrics = MetricRecord(
            {"device": device.number, "samples": device.samples, "loss": float(loss[0]), "finite": 1}
        )
        return Message(RecordDict({"up": arrays(update=update[0]), "metrics": metrics}), reply_to=message)

    return app

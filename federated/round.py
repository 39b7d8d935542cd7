"""One round, as its equations: θ → θ̂_m → Δ_m → Σ_m (B_m/B)·Δ_m → θ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from federated.device import LocalTraining
from federated.downlink import Downlink, Memory
from federated.draws import Draws
from federated.metrics import Row, Tally
from federated.server import Server, late, sample
from federated.uplink import Uplink


@dataclass(kw_only=True)
class World:
    """Everything a round is played with.

    Args:
        server: θ and its step.
        training: what every device does.
        downlink: server → devices.
        uplink: devices → server.
        data: columns (N, …) of all devices.
        parts: M tensors, each device's rows.
        draws: the run's random numbers.
        theta_hat: what the downlink remembers, (1 or M, d) or None.
        error: e_m (M, d), what the devices remember for the uplink, or None.
        asked: devices asked in a round; None: all.
        late: probability that a device misses a round, its update lost.
        devices_at_once: in memory together.
    """

    server: Server
    training: LocalTraining
    downlink: Downlink
    uplink: Uplink
    data: Mapping[str, Tensor]
    parts: Sequence[Tensor]
    draws: Draws
    theta_hat: Memory = None
    error: Memory = None
    asked: int | None = None
    late: float = 0.0
    devices_at_once: int = 64
    samples: Tensor = field(init=False)  # B_m (M,)

    def __post_init__(self) -> None:
        self.samples = torch.tensor([len(part) for part in self.parts], dtype=torch.float32)


def play(world: World, number: int) -> Row:
    """Play a round: move θ, and what is remembered.

    Args:
        world: moved in place.
        number: of the round.
    """
    draws, theta, tally = world.draws.at("round", number), world.server.theta, Tally(number, world.server.theta)
    asked = sample(len(world.parts), world.asked, draws)
    down = world.downlink.send(theta, asked, len(world.parts), world.theta_hat, draws.at("down"))
    tally.downlink(down.traffic)
    if not len(down.devices):
        return tally.skipped("the downlink could serve no device: too thin for one entry")

    up = world.uplink.open(len(theta), len(down.devices), world.error, draws.at("up"))
    for devices in down.devices.split(world.devices_at_once):
        theta_hat = down.receive(devices)  # θ̂_m
        batches = world.training.batches(world.data, world.parts, devices.tolist(), draws)
        update, loss = world.training.updates(theta_hat, batches)  # Δ_m = θ_m^(τ) − θ̂_m
        missed, samples = late(devices, world.late, draws), world.samples[devices]
        sent = up.send(devices, update, samples, loss.isfinite() & ~missed)
        tally.devices(theta_hat, update, loss, samples, sent, missed)

    estimate = up.receive()  # ≈ Σ_m (B_m/B)·Δ_m
    tally.uplink(up.traffic, estimate)
    if estimate is None:
        return tally.unheard()
    if not world.server.step(estimate):  # θ ← θ + Σ_m (B_m/B)·Δ_m
        return tally.skipped("the step would take θ beyond what fp32 can square")
    return tally.row

"""One round, as its equations: θ → θ̂_m → Δ_m → Σ_m (B_m/B)·Δ_m → θ.

The simulator plays all of a round in `play`; Flower opens the same `Round`, sends messages, and closes it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from federated.device import LocalTraining
from federated.downlink import Downlink, Memory
from federated.draws import Draws
from federated.metrics import Row, Tally
from federated.server import Server, draw_asked, draw_late
from federated.uplink import Uplink, UplinkRound


@dataclass(kw_only=True)
class Station:
    """What the server plays rounds with.

    Args:
        server: θ and its step.
        downlink: server → devices.
        uplink: devices → server.
        num_devices: M.
        draws: the run's random numbers.
        theta_hat: what the downlink remembers, (1 or M, d) or None.
        error: e_m (M, d), what the devices remember for the uplink; None where they keep it themselves, or need none.
        asked: devices asked in a round; None: all.
    """

    server: Server
    downlink: Downlink
    uplink: Uplink
    num_devices: int
    draws: Draws
    theta_hat: Memory = None
    error: Memory = None
    asked: int | None = None


class Round:
    """A round under way: θ has been sent down, and the uplink is open to those that it serves.

    Args:
        station: whose downlink memory is moved at once, and whose θ is moved in the end.
        number: of the round.
    """

    def __init__(self, station: Station, number: int) -> None:
        theta, devices = station.server.theta, station.num_devices
        self.station, self.draws, self.tally = station, station.draws.at("round", number), Tally(number, theta)
        asked = draw_asked(devices, station.asked, self.draws)
        self.down = station.downlink.send(theta, asked, devices, station.theta_hat, self.draws.at("down"))
        self.tally.downlink(self.down)

    @functools.cached_property
    def up(self) -> UplinkRound:
        """The uplink's round, of the devices that are served; there is none where nobody is."""
        size, served = len(self.tally.theta), len(self.down.devices)
        return self.station.uplink.open(size, served, self.station.error, self.draws.at("up"))

    def close(self) -> Row:
        """Receive what was sent up, move θ by it, and return what the round did."""
        if not len(self.down.devices):
            return self.tally.skipped("the downlink could serve no device: too thin for one entry")
        estimate = self.up.receive()  # ≈ Σ_m (B_m/B)·Δ_m
        self.tally.uplink(self.up.traffic, estimate)
        if estimate is None:
            return self.tally.unheard()
        if not self.station.server.step(estimate):  # θ ← θ + Σ_m (B_m/B)·Δ_m
            return self.tally.skipped("the step would take θ beyond what fp32 can square")
        return self.tally.row


@dataclass(kw_only=True)
class World(Station):
    """Everything that a simulated round is played with.

    Args:
        training: what every device does.
        data: columns (N, …) of all devices.
        parts: M tensors, each device's rows.
        late: probability that a device misses a round, its update lost.
        devices_at_once: in memory together.
    """

    num_devices: int = field(init=False)
    training: LocalTraining
    data: Mapping[str, Tensor]
    parts: Sequence[Tensor]
    late: float = 0.0
    devices_at_once: int = 64
    samples: Tensor = field(init=False)  # B_m (M,)

    def __post_init__(self) -> None:
        self.num_devices = len(self.parts)
        self.samples = torch.tensor([len(part) for part in self.parts], dtype=torch.float32)


def play(world: World, number: int) -> Row:
    """Play a round: move θ, and what is remembered.

    Args:
        world: moved in place.
        number: of the round.
    """
    here = Round(world, number)
    for devices in here.down.devices.split(world.devices_at_once) if len(here.down.devices) else ():
        theta_hat = here.down.receive(devices)  # θ̂_m
        batches = world.training.batches(world.data, world.parts, devices.tolist(), here.draws)
        update, loss = world.training.updates(theta_hat, batches)  # Δ_m = θ_m^(τ) − θ̂_m
        missed, samples = draw_late(devices, world.late, here.draws), world.samples[devices]
        sent = here.up.send(devices, update, samples, loss.isfinite() & ~missed)
        here.tally.count(loss[sent], late=int(missed.sum()), dropped=int((~sent & ~missed).sum()))
        here.tally.measure(theta_hat, update, samples, sent)
    return here.close()

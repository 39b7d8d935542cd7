"""What every uplink is: the devices' part of it, and a round of it at the server.

What the devices send is added up as it comes, a few devices at a time, so a round needs memory for those and not for
all. The server trusts nothing that it adds up: `UplinkRound.hear` checks it, for the simulator and for Flower.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from federated.downlink import Memory, Traffic
from federated.draws import Draws
from federated.server import check_state, sound


@dataclass
class Encoded:
    """What some devices made of their updates.

    Args:
        payload: (B, p) fp32, what is to be sent.
        held: (B, d) fp32, what each keeps for its next update, or None.
        able: (B,) bool, whose link holds a message at all.
        bits: of all messages, or None where nothing is coded.
    """

    payload: Tensor
    held: Tensor | None
    able: Tensor
    bits: int | None = None


@dataclass(eq=False)
class UplinkRound(abc.ABC):
    """One round of an uplink, opened: devices send, the server receives.

    A scheme's own round adds up payloads in `add`, and makes of the sum in `estimate` what the server moves θ by.

    Args:
        uplink: whose round it is.
        size: d; payloads have as many numbers unless the round says otherwise.
        served: J, devices that the downlink served, each with its share of the link.
        memory: e (M, d), written in place, or None.
        draws: of this link in this round.
    """

    uplink: Uplink
    size: int
    served: int
    memory: Memory
    draws: Draws

    def __post_init__(self) -> None:
        self.weight, self.senders = 0.0, 0
        self.traffic = Traffic()

    def send(self, devices: Tensor, update: Tensor, weight: Tensor, on_time: Tensor | None = None) -> Tensor:
        """Encode and send the updates of some devices, those that are `server.sound`.

        Args:
            devices: (B,) int64, each with its share of the link.
            update: Δ (B, d) fp32.
            weight: B_m (B,), any positive scale.
            on_time: (B,) bool, those that send; None: all. The others' shares stay unused.

        Returns:
            (B,) bool, whose updates were sent and could be added up.
        """
        budget, sent = self.budget(devices), sound(update, weight)
        if on_time is not None:
            sent &= on_time
        if not sent.all():
            budget = [bits for bits, sends in zip(budget, sent.tolist(), strict=True) if sends]
            devices, update, weight = devices[sent], update[sent], weight[sent]
        if not len(devices):
            return sent
        held = None if self.memory is None else self.memory[devices]
        encoded = self.uplink.encode(devices, update, held, budget, self.draws)
        if self.memory is not None and encoded.held is not None:
            self.memory[devices] = encoded.held
        return sent.masked_scatter(sent, self.hear(devices, encoded, weight))

    def hear(self, devices: Tensor, encoded: Encoded, weight: Tensor) -> Tensor:
        """Add up what some devices send, and leave out what can't be added up.

        Args:
            devices: (B,) int64.
            encoded: what they made of their updates.
            weight: B_m (B,).

        Returns:
            (B,) bool, whose payloads are `server.sound`.

        Raises:
            ValueError: payloads of another size or type than the link carries.
        """
        payload = encoded.payload
        if payload.shape != (len(devices), self.size) or payload.dtype != torch.float32:
            got = f"{payload.dtype} {tuple(payload.shape)}"
            raise ValueError(f"payloads must be torch.float32 {(len(devices), self.size)}, got {got}")
        heard = sound(payload, weight)
        able = encoded.able & heard
        if encoded.bits is not None:
            self.traffic.bits = (self.traffic.bits or 0) + encoded.bits
        self.traffic.silent += int((~encoded.able & heard).sum())
        if able.any():
            self.weight += float(weight[able].double().sum())
            self.senders += int(able.sum())
            if able.all():
                self.add(devices, payload, weight)
            else:
                self.add(devices[able], payload[able], weight[able])
        return heard

    def budget(self, devices: Tensor) -> list[float]:
        """Return the bits that each device's link holds."""
        return [math.inf] * len(devices)

    @abc.abstractmethod
    def add(self, devices: Tensor, payload: Tensor, weight: Tensor) -> None:
        """Add some devices' payloads (B, p) to what is received."""

    def receive(self) -> Tensor | None:
        """Estimate the weighted mean of what was sent; None where nobody was heard, or noise is beyond fp32."""
        estimate = self.estimate()
        return estimate if estimate is not None and bool(estimate.isfinite().all()) else None

    @abc.abstractmethod
    def estimate(self) -> Tensor | None:
        """Estimate the mean (d,), finite or not; None where nobody was heard."""


class Uplink(abc.ABC):
    """Brings the mean of the updates to the server, once a round.

    Numbers, words, channels and links that an uplink holds as attributes are its settings: a run is resumed only with
    the same ones. What changes between rounds is a tensor, and in `state`.
    """

    round_type: ClassVar[type[UplinkRound]]

    def memory_rows(self, num_devices: int) -> int:
        """Count the rows (each of d numbers) that devices remember between rounds: 0 or M."""
        return 0

    def state(self) -> dict[str, Tensor]:
        """Return what the server remembers of this link between rounds."""
        return {}

    def load_state(self, state: dict[str, Tensor], size: int) -> None:
        """Restore what `state` returned, for d = size.

        Raises:
            ValueError: something this link does not remember.
        """
        check_state(state, {})

    def encode(
        self, devices: Tensor, update: Tensor, held: Tensor | None, budget: list[float], draws: Draws
    ) -> Encoded:
        """Make what some devices send of their updates, and what they keep.

        Args:
            devices: (B,) int64.
            update: Δ (B, d).
            held: e (B, d), or None.
            budget: bits of each device's link.
            draws: of this link in this round.
        """
        return Encoded(update, held, torch.ones(len(devices), dtype=torch.bool))

    def open(self, size: int, served: int, memory: Memory, draws: Draws) -> UplinkRound:
        """Open a round.

        Args:
            size: d.
            served: J, at least 1.
            memory: e (M, d), written in place, or None.
            draws: of this link in this round.
        """
        return self.round_type(self, size, served, memory, draws)

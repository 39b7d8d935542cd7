"""What a round did and cost, and how good θ is on test data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from federated.device import IGNORED
from federated.downlink import DownlinkRound, Traffic


@dataclass
class Row:
    """What a round did and cost; powers are means per OFDM symbol, channel uses complex symbols.

    Args:
        round: its number, from 1.
        participants: devices whose updates were sent, and sound.
        late: devices that missed the round.
        dropped: devices whose update or loss was not finite, or too large to be added up, and was left out.
        silent_down: devices that could not be served.
        silent_up: devices that could not send.
        skipped: why θ stayed as it was, or nothing.
        train_loss: mean over the participants.
        nmse_down: mean over the served devices of ‖θ̂_m − θ‖²/‖θ‖².
        nmse_up: of the estimate of the participants' mean update.
        bits_down: None where nothing is coded.
        bits_up: None where nothing is coded.
        channel_uses_down: complex symbols.
        channel_uses_up: complex symbols.
        power_down: transmit power.
        power_up: transmit power, mean over the devices that sent.
    """

    round: int
    participants: int = 0
    late: int = 0
    dropped: int = 0
    silent_down: int = 0
    silent_up: int = 0
    skipped: str = ""
    train_loss: float | None = None
    nmse_down: float | None = None
    nmse_up: float | None = None
    bits_down: int | None = None
    bits_up: int | None = None
    channel_uses_down: int = 0
    channel_uses_up: int = 0
    power_down: float = 0.0
    power_up: float = 0.0


class Tally:
    """Fills in a round's row while the round is played.

    Args:
        number: of the round.
        theta: θ (d,), as it was sent.
    """

    def __init__(self, number: int, theta: Tensor) -> None:
        self.row, self.theta = Row(number), theta
        self.served, self.failed, self.loss = 0, 0, 0.0
        self.error_down, self.measured = 0.0, 0
        self.sum, self.weight = torch.zeros_like(theta), 0.0

    def downlink(self, down: DownlinkRound) -> None:
        """Record whom the downlink serves, and what it used."""
        row, traffic = self.row, down.traffic
        row.bits_down, row.channel_uses_down = traffic.bits, traffic.channel_uses
        row.power_down, row.silent_down = traffic.power, traffic.silent
        self.served = len(down.devices)

    def count(self, loss: Tensor, *, late: int, dropped: int, failed: int = 0) -> None:
        """Count what became of some served devices.

        Args:
            loss: of the participants among them (·,).
            late: how many missed the round.
            dropped: how many have updates that can't be added up.
            failed: how many reported an error.
        """
        self.row.participants += len(loss)
        self.row.late += late
        self.row.dropped += dropped
        self.failed += failed
        self.loss += float(loss.double().sum())

    def measure(self, theta_hat: Tensor, update: Tensor, samples: Tensor, sent: Tensor) -> None:
        """Record what some devices (B,) received and made of it, for the errors that only a simulator can know.

        Args:
            theta_hat: θ̂_m (B, d).
            update: Δ_m (B, d).
            samples: B_m (B,).
            sent: (B,) bool, whose updates were sent.
        """
        shared = theta_hat.stride(0) == 0  # one row, seen by all
        error = (theta_hat[:1] if shared else theta_hat) - self.theta
        self.error_down += float(error.square().sum(1).double().sum()) * (len(theta_hat) if shared else 1)
        self.measured += len(theta_hat)
        self.sum += samples @ update if bool(sent.all()) else samples[sent] @ update[sent]
        self.weight += float(samples[sent].double().sum())

    def uplink(self, traffic: Traffic, estimate: Tensor | None) -> None:
        """Record what the uplink used, and how far its estimate is from the mean update."""
        row, energy = self.row, float(self.theta.double().square().sum())
        row.bits_up, row.channel_uses_up = traffic.bits, traffic.channel_uses
        row.power_up, row.silent_up = traffic.power, traffic.silent
        if row.participants:
            row.train_loss = self.loss / row.participants
        if energy and self.measured:
            row.nmse_down = self.error_down / self.measured / energy
        if estimate is not None and self.weight:
            row.nmse_up = nmse(estimate, self.sum / self.weight)

    def unheard(self) -> Row:
        """Record that θ stays as it was since no update was heard, and what became of them."""
        row = self.row
        fates = {"late": row.late, "failed": self.failed, "not finite or too large": row.dropped}
        fates["silent"] = row.silent_up
        fates["lost in noise beyond fp32"] = self.served - sum(fates.values())
        known = ", ".join(f"{count} {fate}" for fate, count in fates.items() if count)
        return self.skipped(f"no update reached the server: of {self.served} devices {known}")

    def skipped(self, why: str) -> Row:
        """Record that θ stays as it was, and why."""
        self.row.skipped = why
        return self.row


@torch.no_grad()
def evaluate(model: nn.Module, data: Mapping[str, Tensor], batch_size: int = 1024) -> dict[str, float]:
    """Measure a Hugging Face model's loss and accuracy; next tokens count where labels are those of a causal model.

    Args:
        model: called as `model(**batch)`, with `.loss` and `.logits`.
        data: columns (N, …), "labels" (N,) or (N, length) among them.
        batch_size: rows at a time.

    Returns:
        "loss" in nats per label, "accuracy" in [0, 1]; labels of −100 count in neither.
    """
    model.eval()
    rows = len(data["labels"])
    loss, right, count = 0.0, 0, 0
    for start in range(0, rows, batch_size):
        batch = {name: column[start : start + batch_size] for name, column in data.items()}
        output, labels = model(**batch), batch["labels"]
        logits = output.logits
        if labels.dim() == 2 and logits.dim() == 3:  # position i predicts token i + 1
            logits, labels = logits[:, :-1], labels[:, 1:]
        counted = labels != IGNORED
        number = int(counted.sum())
        if not number:
            continue
        loss += float(output.loss) * number
        right += int(((logits.argmax(-1) == labels) & counted).sum())
        count += number
    return {"loss": loss / max(count, 1), "accuracy": right / max(count, 1)}


def nmse(estimate: Tensor, truth: Tensor) -> float:
    """Compute ‖estimate − truth‖²/‖truth‖², the normalized mean squared error; infinite for an estimate of nothing."""
    error, energy = float((estimate - truth).double().square().sum()), float(truth.double().square().sum())
    if not energy:
        return float("inf") if error else 0.0
    return error / energy

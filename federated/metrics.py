"""What a round did and cost, and how good θ is on test data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from federated.device import IGNORED
from federated.downlink import Traffic


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
        self.sum, self.weight = torch.zeros_like(theta), 0.0
        self.loss, self.error_down, self.served = 0.0, 0.0, 0

    def downlink(self, traffic: Traffic) -> None:
        """Note what the downlink used."""
        self.row.bits_down, self.row.channel_uses_down = traffic.bits, traffic.channel_uses
        self.row.power_down, self.row.silent_down = traffic.power, traffic.silent

    def devices(
        self, theta_hat: Tensor, update: Tensor, loss: Tensor, samples: Tensor, sent: Tensor, missed: Tensor
    ) -> None:
        """Note what some devices (B,) received and made of it, whose updates were sent, and who was late."""
        shared = theta_hat.stride(0) == 0  # one row, seen by all
        error = (theta_hat[:1] if shared else theta_hat) - self.theta
        self.error_down += float(error.square().sum(1).double().sum()) * (len(theta_hat) if shared else 1)
        self.served += len(theta_hat)
        self.row.late += int(missed.sum())
        self.row.dropped += int((~sent & ~missed).sum())
        self.row.participants += int(sent.sum())
        self.sum += samples @ update if bool(sent.all()) else samples[sent] @ update[sent]
        self.weight += float(samples[sent].double().sum())
        self.loss += float(loss[sent].double().sum())

    def uplink(self, traffic: Traffic, estimate: Tensor | None) -> None:
        """Note what the uplink used, and how far its estimate is from the mean update."""
        row, energy = self.row, float(self.theta.double().square().sum())
        row.bits_up, row.channel_uses_up = traffic.bits, traffic.channel_uses
        row.power_up, row.silent_up = traffic.power, traffic.silent
        if row.participants:
            row.train_loss = self.loss / row.participants
        if energy:
            row.nmse_down = self.error_down / self.served / energy
        if estimate is not None:
            row.nmse_up = nmse(estimate, self.sum / self.weight)

    def unheard(self) -> Row:
        """Note that θ stays as it was since no update was heard, and what became of them."""
        row = self.row
        fates = {"late": row.late, "not finite or too large": row.dropped, "silent": row.silent_up}
        fates["lost in noise beyond fp32"] = self.served - sum(fates.values())
        known = ", ".join(f"{count} {fate}" for fate, count in fates.items() if count)
        return self.skipped(f"no update reached the server: of {self.served} devices {known}")

    def skipped(self, why: str) -> Row:
        """Note that θ stays as it was."""
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
    """‖estimate − truth‖²/‖truth‖², normalized mean squared error; infinite for an estimate of nothing."""
    error, energy = float((estimate - truth).double().square().sum()), float(truth.double().square().sum())
    if not energy:
        return float("inf") if error else 0.0
    return error / energy

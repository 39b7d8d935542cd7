import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from federated.downlink import DownlinkRound, Traffic
from federated.metrics import Tally, evaluate, nmse
from tests.federated.small import small_data, small_model


def test_loss_and_accuracy_are_those_of_all_rows_at_once():
    model, data = small_model("cnn"), small_data(50)
    output = model(**data)
    found = evaluate(model, data, batch_size=7)
    assert found["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert found["accuracy"] == int((output.logits.argmax(1) == data["labels"]).sum()) / 50


def test_ignored_labels_count_in_neither():
    model, data = small_model("cnn"), small_data(50)
    whole = evaluate(model, {name: column[:20] for name, column in data.items()})
    data["labels"] = data["labels"].masked_fill(torch.arange(50) >= 20, -100)
    found = evaluate(model, data, batch_size=25)
    assert found["accuracy"] == whole["accuracy"]
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-5)


class Next(nn.Module):
    """Predicts that every token is followed by the next number."""

    def forward(self, input_ids, labels):
        logits = nn.functional.one_hot((input_ids + 1) % 10, 10).float() * 9
        return SimpleNamespace(
            loss=nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits=logits
        )


def test_a_causal_model_is_judged_by_the_next_token():
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 1]])
    labels = tokens.clone()
    labels[0, 1] = -100
    assert evaluate(Next(), {"input_ids": tokens, "labels": labels})["accuracy"] == 4 / 5


def test_a_round_in_which_nothing_is_heard_says_what_became_of_every_device():
    tally = Tally(3, torch.ones(2))
    tally.downlink(DownlinkRound(torch.arange(10)))
    tally.count(torch.ones(2), late=3, dropped=1, failed=2)
    tally.uplink(Traffic(silent=1), None)
    sentence = "3 late, 2 failed, 1 not finite or too large, 1 silent, 3 lost in noise beyond fp32"
    assert tally.unheard().skipped == f"no update reached the server: of 10 devices {sentence}"
    assert (tally.row.participants, tally.row.train_loss, tally.row.nmse_up) == (2, 1.0, None)


def test_nmse_is_the_error_over_the_energy():
    truth = torch.tensor([3.0, 4.0])
    assert nmse(truth + torch.tensor([0.0, 5.0]), truth) == 1.0
    assert nmse(torch.zeros(2), torch.zeros(2)) == 0.0
    assert nmse(truth, torch.zeros(2)) == math.inf

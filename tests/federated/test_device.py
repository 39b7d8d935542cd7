from functools import partial

import pytest
import torch
from torch import nn

from federated.device import (
    IGNORED,
    Batches,
    Flat,
    draw_batches,
    saved_bytes,
    updates_in_a_loop,
    updates_in_one_call,
    updates_in_threads,
)
from federated.draws import Draws
from sgc import SGC
from tests.federated.small import SGD, M, small_data, small_model, small_parts, training
from tests.tolerances import SUM

DRAWS = Draws((0, "round"))
DATA, PARTS = small_data(), small_parts()


def block(train, spread=0.1):
    theta = train.flat.read(train.model)
    theta_hat = theta + spread * torch.randn(M, len(theta), generator=torch.Generator().manual_seed(0))
    return theta_hat, train.batches(DATA, PARTS, list(range(M)), DRAWS)


OPTIMIZERS = {
    "sgd": SGD,
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "sgc": partial(SGC, lr=0.01, chunk_size=64, sketch_size=32, sparsity=4, min_size=16),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("model", ["softmax", "cnn"])
@pytest.mark.parametrize("batch_size", [8, None])
def test_one_batched_call_is_the_loop_over_devices(name, model, batch_size):
    """The two sum in different orders; AdamW and SGC divide by √v̂, which magnifies that where gradients are tiny."""
    train = training(small_model(model), optimizer=OPTIMIZERS[name], batch_size=batch_size)
    theta_hat, batches = block(train)
    before = theta_hat.clone()
    together, loss = updates_in_one_call(train, theta_hat, batches)
    apart, loss_apart = updates_in_a_loop(train, theta_hat, batches)
    assert torch.equal(theta_hat, before)
    assert (loss - loss_apart).abs().max() <= 1e-5
    tolerance = 4 * SUM if name in ("sgd", "momentum") else 2e-2
    assert (together - apart).abs().max() <= tolerance * apart.abs().max()
    assert apart.any(1).all()


def test_one_full_batch_step_of_sgd_is_the_gradient():
    train = training(steps=1, batch_size=None)
    theta_hat, batches = block(train)
    update, loss = train.updates(theta_hat, batches)
    for m in range(M):
        train.flat.write(theta_hat[m], train.model)
        own = {name: column[PARTS[m]] for name, column in DATA.items()}
        output = train.model(**own)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(output.loss, list(train.model.parameters()))])
        assert (update[m] + 0.1 * gradient).abs().max() < 1e-6
        assert float(loss[m]) == pytest.approx(output.loss.item(), rel=1e-5)


class Peeking(nn.Module):
    """Looks into its data, as transformers' encoders do into their attention mask."""

    def __init__(self):
        super().__init__()
        self.model = small_model()

    def forward(self, pixel_values, labels):
        return self.model(pixel_values if pixel_values.isfinite().all() else pixel_values.nan_to_num(), labels)


def test_what_has_no_batched_form_or_convolves_is_looped_over_and_all_else_is_batched():
    for train, batched in [
        (training(small_model("softmax")), True),
        (training(small_model("vit")), False),
        (training(small_model("cnn")), False),
        (training(small_model("cnn"), batched=True), True),
        (training(Peeking()), False),
    ]:
        assert train.in_one_call(*block(train)) == batched
    peeking, plain = training(Peeking()), training(batched=False)
    assert torch.equal(peeking.updates(*block(peeking))[0], plain.updates(*block(plain))[0])


def test_an_error_of_the_model_is_not_taken_for_a_missing_batched_form():
    train = training()
    theta_hat, batches = block(train)
    wrong = Batches({"pixel_values": DATA["pixel_values"][:, :, :7], "labels": DATA["labels"]}, batches.index, None)
    with pytest.raises(RuntimeError, match="size"):
        train.updates(theta_hat, wrong)


@pytest.mark.parametrize("threads", [1, 2, 9])
def test_the_loop_gives_the_same_numbers_on_any_number_of_cores(threads):
    train = training(small_model("cnn"), batch_size=12)
    theta_hat, batches = block(train)
    before, start = torch.get_num_threads(), train.flat.read(train.model)
    try:
        torch.set_num_threads(1)
        expected = updates_in_a_loop(train, theta_hat, batches)
        train.flat.write(start, train.model)
        torch.set_num_threads(threads)
        found = updates_in_threads(train, theta_hat, batches)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert batches.real is not None  # padding goes along
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(train.flat.read(train.model), start)


def test_batches_are_the_devices_own_rows_each_once_per_pass():
    batches = draw_batches(DATA, PARTS, 5, 8, range(M), DRAWS)
    for m, part in enumerate(PARTS):
        order = batches.index[m].flatten()
        assert set(order.tolist()) <= set(part.tolist())
        for start in range(0, len(order) - len(part) + 1, len(part)):
            assert len(set(order[start : start + len(part)].tolist())) == len(part)


def test_what_a_device_trains_on_is_decided_by_its_number_and_the_round():
    together = draw_batches(DATA, PARTS, 2, 8, range(M), DRAWS)
    alone = draw_batches(DATA, PARTS[3:4], 2, 8, [3], DRAWS)
    assert torch.equal(together.index[3:4], alone.index)
    assert not torch.equal(alone.index, draw_batches(DATA, PARTS[3:4], 2, 8, [3], DRAWS.at("next")).index)


def test_padding_counts_for_nothing():
    batches = draw_batches(DATA, PARTS, 1, 16, range(M), DRAWS)
    labels = batches.at(0)["labels"]
    assert (labels[0] == IGNORED).sum() == 6  # the first device has ten rows
    assert (labels[1:] != IGNORED).all()
    train = training(batch_size=16, steps=1)
    theta_hat, _ = block(train)
    small, _ = updates_in_one_call(train, theta_hat[:1], draw_batches(DATA, PARTS[:1], 1, 10, [0], DRAWS))
    padded, _ = updates_in_one_call(train, theta_hat, batches)
    assert (padded[:1] - small).abs().max() <= SUM * small.abs().max()


def test_theta_is_written_and_read_back_and_tied_parameters_lie_in_it_once():
    tied = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7, bias=False))
    tied[1].weight = tied[0].weight
    flat = Flat.of(tied)
    assert flat.size == 21
    theta = torch.randn(21)
    flat.write(theta, tied)
    assert torch.equal(flat.read(tied), theta)
    assert torch.equal(tied[1].weight.flatten(), theta)


def test_only_parameters_that_require_a_gradient_are_trained():
    model = small_model("cnn")
    model.first.requires_grad_(False)
    train = training(model)
    kept = model.first.weight.clone()
    theta_hat, batches = block(train)
    train.updates(theta_hat, batches)
    assert torch.equal(model.first.weight, kept)
    assert train.flat.size == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_more_samples_keep_more_for_the_backward_pass():
    small, large = (saved_bytes(t, block(t)[1]) for t in (training(small_model("cnn"), batch_size=b) for b in (2, 8)))
    assert 2 * small < large


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: training(steps=0), "steps must be at least 1, got 0"),
        (lambda: training(batch_size=0), "batch_size must be at least 1, got 0"),
        (
            lambda: training(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
            "statistics of its batches on devices, 1 does",
        ),
        (lambda: training(nn.ReLU()), "no parameter that requires a gradient"),
        (lambda: training(nn.Linear(2, 2).bfloat16()), "must be fp32 on the CPU, weight is torch.bfloat16 on cpu"),
        (lambda: training(nn.Linear(2, 2, device="meta")), "must be fp32 on the CPU, weight is torch.float32 on meta"),
        (
            lambda: draw_batches({"labels": torch.zeros(120)}, PARTS, 1, 16, range(M), DRAWS),
            "every device needs a batch's 16 rows, one has 10",
        ),
    ],
)
def test_training_that_cannot_be_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()

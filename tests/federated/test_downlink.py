import math

import numpy as np
import pytest
import torch

from federated.channel import Channel
from federated.downlink import (
    AnalogDownlink,
    DigitalDownlink,
    IdealDownlink,
    SelectionDownlink,
    mmse,
    split_symbols,
)
from federated.draws import Draws
from federated.quantize import MOST_BITS
from tests.tolerances import SIGMAS

M, D = 6, 301
DRAWS = Draws((0, "down"))
THETA = torch.randn(D, generator=torch.Generator().manual_seed(0))
ALL = torch.arange(M)


def memory_of(downlink):
    rows = downlink.memory_rows(M)
    return torch.zeros(rows, D) if rows else None


def test_the_ideal_downlink_hands_over_theta():
    reception = IdealDownlink().send(THETA, ALL, M, None, DRAWS)
    assert torch.equal(reception.receive(torch.tensor([1, 4])), THETA.expand(2, D))


@pytest.mark.parametrize(
    "make",
    [
        lambda channel: AnalogDownlink(channel),
        lambda channel: DigitalDownlink(channel),
        lambda channel: SelectionDownlink(channel, M),
    ],
)
def test_without_noise_every_link_reaches_its_limit(make):
    """Analog: θ itself. Digital: the quantizer at top levels, an error of at most one step an entry."""
    channel = Channel.from_snr(math.inf, subchannels=8, ofdm_symbols=24)
    downlink = make(channel)
    reception = downlink.send(THETA, ALL, M, memory_of(downlink), DRAWS)
    assert torch.equal(reception.devices, ALL)
    error = (reception.receive(ALL) - THETA).abs().max()
    if isinstance(downlink, AnalogDownlink):
        assert error <= 1e-5 * float(THETA.abs().max())
    else:
        assert 0 < error <= 1.01 * float(THETA.abs().max()) / (2**MOST_BITS - 1)


@pytest.mark.parametrize("snr_db", [-10.0, 0.0, 20.0])
@pytest.mark.parametrize("fading", ["block", "none"])
def test_the_mmse_estimate_has_the_error_of_its_formula(snr_db, fading):
    """Given every gain, and on average: E[E_x·σ²/(|h|²E_x + σ²)] = E_x·e^{1/γ}·E₁(1/γ)/γ under Rayleigh fading."""
    from scipy.special import exp1

    n = 100_000
    channel = Channel.from_snr(snr_db, power=n * 1.0, subchannels=n, gain_variance=2.0, fading=fading)
    gains = channel.gains([0], 1, DRAWS)[0, 0]
    x = torch.randn(1, n, generator=DRAWS.generator("x"), dtype=torch.complex64)  # E_x = 1
    y = gains * x + channel.noise((1, n), DRAWS.generator("noise"))
    squared = (mmse(y, gains, 1.0, channel.noise_variance) - x).abs().double().square().flatten()
    formula = channel.noise_variance / (gains.abs().double().square() + channel.noise_variance).flatten()
    ratio = squared / formula  # exponential with mean 1
    assert abs(float(ratio.mean()) - 1) <= SIGMAS / math.sqrt(n)
    gamma = 10 ** (snr_db / 10)
    mean = np.exp(1 / gamma) * exp1(1 / gamma) / gamma if fading == "block" else 1 / (1 + gamma)
    assert abs(float(squared.mean()) - mean) <= SIGMAS * float(squared.std()) / math.sqrt(n)


def test_no_other_scaling_has_less_error_than_mmse():
    n = 50_000
    gains = torch.randn(n, dtype=torch.complex64, generator=DRAWS.generator("g"))
    x = torch.randn(n, dtype=torch.complex64, generator=DRAWS.generator("x"))
    y = gains * x + torch.randn(n, dtype=torch.complex64, generator=DRAWS.generator("z"))
    estimate = mmse(y, gains, 1.0, 1.0)
    best = (estimate - x).abs().square().mean()
    for factor in (0.9, 1.1, 0.95 + 0.1j):
        assert (factor * estimate - x).abs().square().mean() > best


@pytest.mark.parametrize("subchannels", [1, 16])
def test_the_analog_downlink_transmits_with_the_requested_power(subchannels):
    channel = Channel(power=3.0, subchannels=subchannels)
    reception = AnalogDownlink(channel).send(THETA, ALL, M, None, DRAWS)
    symbols = math.ceil(math.ceil(D / 2) / subchannels)
    assert float(reception.sent.abs().square().sum()) / symbols == pytest.approx(3.0, rel=1e-5)
    assert reception.traffic.channel_uses == symbols * subchannels
    assert reception.traffic.power == 3.0


def test_each_device_hears_theta_through_its_own_channel_whatever_the_blocks():
    downlink = AnalogDownlink(Channel.from_snr(5.0, subchannels=16))
    reception = downlink.send(THETA, ALL, M, None, DRAWS)
    together = reception.receive(ALL)
    assert torch.equal(together[2:4], reception.receive(torch.tensor([2, 3])))
    assert not torch.equal(together[0], together[1])


def test_a_zero_vector_is_heard_as_zero():
    reception = AnalogDownlink(Channel()).send(torch.zeros(D), ALL, M, None, DRAWS)
    assert torch.equal(reception.receive(ALL), torch.zeros(M, D))
    assert reception.traffic.power == 0


def test_the_common_rate_is_that_of_the_worst_device():
    channel = Channel.from_snr(3.0, subchannels=4, ofdm_symbols=100)
    downlink = DigitalDownlink(channel)
    memory = memory_of(downlink)
    reception = downlink.send(THETA, ALL[:2], M, memory, DRAWS)
    gains = channel.gains(range(M), 100, DRAWS)
    snr = gains.abs().double().square() / (4 * channel.noise_variance)
    budget = math.floor(100 * float(torch.log2(1 + snr).sum(3).min()))
    assert budget - 200 < reception.traffic.bits <= budget
    assert torch.equal(reception.receive(ALL[:2])[1], memory[0])
    before = float((memory[0] - THETA).norm())
    downlink.send(THETA, ALL, M, memory, DRAWS.at("next"))
    assert float((memory[0] - THETA).norm()) < before < float(THETA.norm())


def test_the_devices_of_highest_rate_are_selected_and_the_others_keep_what_they_have():
    channel = Channel.from_snr(10.0, ofdm_symbols=200)
    downlink = SelectionDownlink(channel, 2)
    memory = memory_of(downlink)
    reception = downlink.send(THETA, ALL, M, memory, DRAWS)
    strength = channel.gains(range(M), 200, DRAWS).abs().flatten()
    best = strength.argsort(descending=True)[:2].sort().values
    assert torch.equal(reception.devices, best)
    moved = memory.any(1).nonzero().flatten()
    assert torch.equal(moved, best)
    assert torch.equal(reception.receive(best), memory[best])
    capacity = channel.capacity(channel.gains(best.tolist(), 200, DRAWS), 200)
    assert reception.traffic.bits <= float(capacity.sum()) / 2


def test_only_devices_that_are_asked_are_selected():
    downlink = SelectionDownlink(Channel.from_snr(10.0, ofdm_symbols=2000), 3)
    reception = downlink.send(THETA, torch.tensor([1, 5]), M, memory_of(downlink), DRAWS)
    assert reception.devices.tolist() == [1, 5]


def test_estimates_are_better_with_fewer_participants():
    channel = Channel.from_snr(10.0, ofdm_symbols=300)
    errors = []
    for participants in (1, 3, 6):
        downlink = SelectionDownlink(channel, participants)
        reception = downlink.send(THETA, ALL, M, memory_of(downlink), DRAWS)
        errors.append(float((reception.receive(reception.devices) - THETA).square().mean()))
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("make", [DigitalDownlink, lambda channel: SelectionDownlink(channel, 3)])
def test_a_link_too_thin_for_one_entry_serves_nobody_and_says_how_many_wanted(make):
    downlink = make(Channel.from_snr(-30.0, ofdm_symbols=3))
    memory = memory_of(downlink)
    reception = downlink.send(THETA, ALL, M, memory, DRAWS)
    assert len(reception.devices) == 0
    assert reception.traffic.silent in (3, M)
    assert not memory.any()


def test_a_device_whose_own_link_is_too_thin_is_left_out():
    channel = Channel.from_snr(0.0, ofdm_symbols=6 * 90)
    downlink = SelectionDownlink(channel, M)
    reception = downlink.send(THETA, ALL, M, memory_of(downlink), DRAWS)
    assert 0 < len(reception.devices) < M
    assert reception.traffic.silent == M - len(reception.devices)


@pytest.mark.parametrize(("symbols", "participants"), [(10, 3), (400, 40), (3, 5)])
def test_all_ofdm_symbols_are_shared_out(symbols, participants):
    shares = split_symbols(symbols, participants)
    assert sum(shares) == symbols
    assert max(shares) - min(shares) <= 1


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="participants must be at most num_devices=6, got 7"):
        SelectionDownlink(Channel(ofdm_symbols=5), 7).memory_rows(M)
    with pytest.raises(ValueError, match="participants must be at least 1, got 0"):
        SelectionDownlink(Channel(ofdm_symbols=5), 0)
    with pytest.raises(ValueError, match="a digital link needs a budget"):
        DigitalDownlink(Channel())
    with pytest.raises(ValueError, match="above the budget of ofdm_symbols=5"):
        AnalogDownlink(Channel(ofdm_symbols=5)).send(THETA, ALL, M, None, DRAWS)

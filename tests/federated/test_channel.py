import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from federated.channel import Channel, MultipleAccess, energy, pack, unpack
from federated.draws import Draws
from tests.tolerances import EPS, SIGMAS

DRAWS = Draws((0, "test"))


@pytest.mark.parametrize("snr_db", [-10.0, 0.0, 10.0, 25.0])
@pytest.mark.parametrize("fading", ["block", "iid", "none"])
@pytest.mark.parametrize("subchannels", [40, 1000])
def test_the_measured_snr_is_the_requested_one(snr_db, fading, subchannels):
    """Over 2·10⁵ symbols the two mean powers have a standard error of 0.3 % each: 0.1 dB is 2.3 %."""
    devices, symbols = 200_000 // subchannels, 1
    channel = Channel.from_snr(snr_db, power=3.0, subchannels=subchannels, gain_variance=0.5, fading=fading)
    gains = channel.gains(range(devices), symbols, DRAWS)
    sent = torch.full((1, 1, symbols, subchannels), math.sqrt(channel.power / subchannels), dtype=torch.complex64)
    noise = channel.noise((devices, 1, symbols, subchannels), DRAWS.generator("noise"))
    measured = 10 * math.log10(float((gains * sent).abs().square().mean() / noise.abs().square().mean()))
    assert abs(measured - snr_db) < 0.1
    assert channel.snr_db == pytest.approx(snr_db)


def test_gains_and_noise_are_circular_gaussians_of_the_stated_variance():
    channel = Channel(gain_variance=2.0, noise_variance=0.25, subchannels=100_000)
    for drawn, variance in [
        (channel.gains([3], 1, DRAWS).flatten(), 2.0),
        (channel.noise((100_000,), DRAWS.generator("noise")), 0.25),
    ]:
        n = len(drawn)
        assert abs(float(drawn.abs().square().mean()) - variance) < SIGMAS * variance / math.sqrt(n)
        assert abs(float(drawn.real.square().mean()) - variance / 2) < SIGMAS * variance / math.sqrt(2 * n)
        assert abs(complex(drawn.square().mean())) < SIGMAS * math.sqrt(2) * variance / math.sqrt(n)
        assert abs(complex(drawn.mean())) < SIGMAS * math.sqrt(variance / n)


def test_gains_belong_to_a_device_and_a_round_whoever_else_is_asked_for():
    channel = MultipleAccess(subchannels=4, antennas=3)
    together = channel.gains([5, 9, 2], 7, DRAWS, antennas=3)
    assert torch.equal(together[1:2], channel.gains([9], 7, DRAWS, antennas=3))
    assert not torch.equal(together[1:2], channel.gains([9], 7, DRAWS.at("another round"), antennas=3))


@pytest.mark.parametrize(("fading", "fresh"), [("block", 1), ("iid", 7), ("none", 1)])
def test_gains_hold_for_a_round_or_for_one_ofdm_symbol(fading, fresh):
    gains = Channel(subchannels=4, fading=fading).gains([0, 1], 7, DRAWS)
    assert gains.shape == (2, 1, fresh, 4)
    assert len(set(gains.flatten().tolist())) == (1 if fading == "none" else gains.numel())


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 3))
def test_packing_loses_nothing_and_needs_the_stated_symbols(size, subchannels, batch):
    x = torch.randn(batch, size)
    symbols = pack(x, subchannels)
    assert symbols.shape == (batch, math.ceil(math.ceil(size / 2) / subchannels), subchannels)
    assert symbols.shape[1] == Channel(subchannels=subchannels).symbols_for(size)
    assert torch.equal(unpack(symbols, size), x)
    assert torch.allclose(energy(symbols), x.double().square().sum(1), rtol=1e-12)


def test_the_first_half_is_the_real_part():
    assert pack(torch.tensor([[1.0, 2.0, 3.0]]), 1).flatten().tolist() == [1 + 3j, 2 + 0j]


def test_capacity_is_the_sum_of_logarithms():
    channel = Channel(power=2.0, noise_variance=0.5, subchannels=3, fading="iid")
    gains = channel.gains([0, 1], 5, DRAWS)
    bits = [
        sum(math.log2(1 + 2.0 * abs(complex(h)) ** 2 / (3 * 0.5)) for h in gains[device].flatten()) for device in (0, 1)
    ]
    assert channel.capacity(gains, 5).tolist() == pytest.approx(bits, rel=64 * EPS)
    block = gains[:, :, :1]
    assert torch.allclose(channel.capacity(block, 10), 10 * channel.capacity(block, 1))
    assert Channel(noise_variance=0.0).capacity(gains, 5).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"power": 0.0}, "power must be positive and finite, got 0.0"),
        ({"power": -1.0}, "power must be positive and finite, got -1.0"),
        ({"noise_variance": -1.0}, "noise_variance must not be negative, got -1.0"),
        ({"subchannels": 0}, "subchannels must be at least 1, got 0"),
        ({"ofdm_symbols": 0}, "ofdm_symbols must be at least 1, got 0"),
        ({"gain_variance": 0.0}, "gain_variance must be positive and finite, got 0.0"),
        ({"fading": "rician"}, "fading must be one of block, iid, none, got 'rician'"),
        ({"antennas": 0}, "antennas must be at least 1, got 0"),
        ({"csi_error_variance": -0.1}, "csi_error_variance must not be negative, got -0.1"),
    ],
)
def test_a_channel_that_cannot_be_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        MultipleAccess(**arguments)


@pytest.mark.parametrize("snr_db", [-math.inf, math.nan, 4000.0, -4000.0])
def test_an_snr_that_no_channel_has_is_refused(snr_db):
    with pytest.raises(ValueError, match=r"snr_db must be in \[-300, 300\], or inf for no noise, got"):
        Channel.from_snr(snr_db)


def test_more_than_the_budget_is_refused_with_both_numbers():
    with pytest.raises(
        ValueError, match="1000 uncoded numbers need 50 OFDM symbols of 10 subchannels.*ofdm_symbols=49"
    ):
        Channel(subchannels=10, ofdm_symbols=49).symbols_for(1000)

"""The server trusts no update: what can't be added up is left out and counted, in the simulator and on Flower."""

import math

import pytest
import torch

from federated.channel import Channel, MultipleAccess
from federated.downlink import DigitalDownlink, SelectionDownlink, mmse
from federated.draws import Draws
from federated.quantize import quantize_within
from federated.server import MOST, Server, sound
from federated.simulate import Simulation
from federated.uplink import AnalogUplink, BlindUplink, Encoded, IdealUplink, QuantizedUplink, SketchedUplink
from tests.federated.small import M, small_data, small_parts, training

DATA, PARTS = small_data(), small_parts()
MAC = MultipleAccess.from_snr(20.0, subchannels=8)
SKETCH = {"chunk_size": 65, "sketch_size": 30, "sparsity": 5}
UPLINKS = {
    "ideal": IdealUplink,
    "quantized": lambda: QuantizedUplink(levels=7),
    "thin": lambda: QuantizedUplink(channel=Channel.from_snr(20.0, subchannels=8, ofdm_symbols=40)),
    "analog": lambda: AnalogUplink(MAC, 0.1),
    "blind": lambda: BlindUplink(MultipleAccess.from_snr(20.0, subchannels=8, antennas=64)),
    "sketched": lambda: SketchedUplink(IdealUplink(), residual=0.9, **SKETCH),
    "sketched over the air": lambda: SketchedUplink(AnalogUplink(MAC, 0.1), **SKETCH),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e37, 1e30])
@pytest.mark.parametrize("up", UPLINKS)
def test_a_broken_sensor_is_dropped_and_spoils_nothing(up, value):
    data = dict(DATA, pixel_values=DATA["pixel_values"].clone())
    data["pixel_values"][PARTS[1]] = value
    sim = Simulation(training(batch_size=None, steps=1), data, PARTS, uplink=UPLINKS[up](), devices_at_once=2)
    rows = list(sim.run(3, progress=False))
    assert [(row["dropped"], row["participants"], row["skipped"]) for row in rows] == [(1, M - 1, "")] * 3
    assert sim.theta.isfinite().all()
    assert sim.world.error is None or sim.world.error.isfinite().all()
    if up == "ideal":
        others = [part for m, part in enumerate(PARTS) if m != 1]
        without = Simulation(training(batch_size=None, steps=1), DATA, others)
        list(without.run(3, progress=False))
        assert torch.allclose(sim.theta, without.theta, atol=1e-6)


@pytest.mark.parametrize("up", UPLINKS)
def test_what_is_heard_is_checked_and_what_is_left_out_changes_nothing(up):
    """As a payload and as a weight, through `hear`, which Flower's server calls."""
    size, draws, one = 130, Draws((0,)), torch.tensor([1])

    def heard(evil):
        uplink = UPLINKS[up]()
        round_ = uplink.open(size, 2, None, draws)
        update = torch.randn(1, size, generator=torch.Generator().manual_seed(0))
        sent = uplink.encode(one, update, None, [1e4], draws)
        for payload, weight in evil(sent.payload):
            got = round_.hear(torch.tensor([0]), Encoded(payload, None, torch.tensor([True])), torch.tensor([weight]))
            assert not got.any()
        assert round_.hear(one, sent, torch.tensor([3.0])).all()
        return round_.receive()

    def evil(payload):
        for value in (math.nan, math.inf, -math.inf, 1e37, -3e38):
            spoilt = payload.clone()
            spoilt[0, -1] = value
            yield spoilt, 10.0
        for weight in (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e30):
            yield payload, weight

    assert torch.equal(heard(evil), heard(lambda payload: ()))
    payload = UPLINKS[up]().encode(one, torch.ones(1, size), None, [1e4], draws).payload
    for wrong in (payload.double(), payload.half(), payload.long(), payload[:, :-1], payload[None], payload[0]):
        round_ = UPLINKS[up]().open(size, 2, None, draws)
        with pytest.raises(ValueError, match=r"payloads must be torch.float32 \(1, \d+\), got torch"):
            round_.hear(one, Encoded(wrong, None, torch.tensor([True])), torch.ones(1))


def test_sound_is_what_sums_hold():
    update = torch.tensor([[0.0, 1e17], [0.0, -1.1e18], [1.0, math.nan], [math.inf, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert sound(update, torch.tensor([10.0, 1.0, 1.0, 1.0, 5.0, 0.0])).tolist() == [True, False, False, False, True,
                                                                                    False]  # fmt: skip
    assert torch.tensor(MOST).square().isfinite()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_server_makes_no_step_that_would_lose_the_model(momentum):
    server = Server(torch.zeros(3), lr=1e3, momentum=momentum)
    assert server.step(torch.ones(3))
    held = {name: value.clone() for name, value in server.state().items()}
    for value in (math.nan, math.inf, 1e16, -1e16):
        assert not server.step(torch.tensor([0.0, value, 0.0]))
    assert all(torch.equal(held[name], value) for name, value in server.state().items())


def test_noise_beyond_fp32_skips_the_round():
    loud = MultipleAccess(noise_variance=1e80)
    sim = Simulation(training(), DATA, PARTS, uplink=SketchedUplink(AnalogUplink(loud), residual=1.0, **SKETCH))
    start = sim.theta.clone()
    (row,) = sim.run(1, progress=False)
    assert row["skipped"] == "no update reached the server: of 5 devices 5 lost in noise beyond fp32"
    assert torch.equal(sim.theta, start)
    assert sim.world.uplink.residual is None


# ------------------------------------------------------------------------------------------ links without noise


def chosen(channel, devices=12, participants=3, rounds=15):
    link = SelectionDownlink(channel, participants)
    memory, theta = torch.zeros(devices, 40), torch.ones(40)
    places = [Draws((0,)).at("round", t) for t in range(rounds)]
    return [link.send(theta, torch.arange(devices), devices, memory.clone(), at).devices.tolist() for at in places]


@pytest.mark.parametrize("fading", ["block", "iid"])
@pytest.mark.parametrize("subchannels", [1, 4])
def test_without_noise_the_best_channels_are_those_of_very_little_noise(fading, subchannels):
    common = {"subchannels": subchannels, "fading": fading, "ofdm_symbols": 9}
    without = chosen(Channel.from_snr(math.inf, **common))
    assert without == chosen(Channel.from_snr(200.0, **common))
    assert len({tuple(devices) for devices in without}) > 5


@pytest.mark.parametrize("snr", [10.0, math.inf])
def test_among_equal_channels_everybody_gets_a_turn(snr):
    picked = chosen(Channel.from_snr(snr, fading="none", ofdm_symbols=300), rounds=60)
    assert {device for devices in picked for device in devices} == set(range(12))
    assert all(len(devices) == 3 for devices in picked)


def test_more_devices_than_symbols_share_what_there_is_without_noise_too():
    """The first get a symbol, for the others no bit is left."""
    picked = chosen(Channel.from_snr(math.inf, ofdm_symbols=2), participants=5)
    assert all(len(devices) == 2 for devices in picked)


def test_a_channel_that_carries_nothing_is_worth_nothing():
    gains = torch.zeros(2, 1, 1, 3, dtype=torch.complex64)
    gains[1, ..., 0] = 1e-30
    silent = Channel.from_snr(math.inf, subchannels=3, ofdm_symbols=4)
    assert silent.capacity(gains, 4).tolist() == [0.0, math.inf]
    assert silent.quality(gains, 4).tolist() == [-math.inf, -math.inf]
    noisy = Channel.from_snr(0.0, subchannels=3, ofdm_symbols=4)
    assert torch.equal(noisy.quality(gains, 4), noisy.capacity(gains, 4))
    assert mmse(torch.zeros(1), gains[0, 0, 0, :1], 1.0, 0.0).tolist() == [0]
    tiny = torch.tensor([1e-25 + 0j])
    assert mmse(tiny, tiny, 1e-30, 0.0).isfinite().all()


def test_numbers_too_small_to_divide_by_are_quantized_without_nan():
    x = torch.tensor([1e-40, 3e-40, 0.0, -2e-40])
    message = quantize_within(x, math.inf, torch.Generator())
    assert torch.equal(message.dense(), x)


@pytest.mark.parametrize("downlink", [SelectionDownlink, DigitalDownlink])
def test_digital_links_without_noise_lose_nothing_that_a_level_holds(downlink):
    channel = Channel.from_snr(math.inf, ofdm_symbols=5)
    link = downlink(channel, 2) if downlink is SelectionDownlink else downlink(channel)
    theta, memory = torch.randn(40), torch.zeros(link.memory_rows(4), 40)
    reception = link.send(theta, torch.arange(4), 4, memory, Draws((0,)))
    assert torch.allclose(reception.receive(reception.devices), theta, atol=float(theta.abs().max()) / 2**15)

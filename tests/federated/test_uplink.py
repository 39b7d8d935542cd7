import math
from functools import partial

import numpy as np
import pytest
import torch

from federated.channel import Channel, MultipleAccess, pack
from federated.draws import Draws
from federated.quantize import message_bits
from federated.uplink import (
    AnalogUplink,
    BlindUplink,
    IdealUplink,
    QuantizedUplink,
    SketchedUplink,
    blind_error,
    sketch_size_that_fits,
)
from sgc.codec import Codec
from tests.tolerances import SIGMAS, SUM

DRAWS = Draws((0, "up"))
M, D = 8, 1000
ALL = torch.arange(M)
WEIGHT = torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 6])
UPDATE = torch.randn(M, D, generator=torch.Generator().manual_seed(0))
MEAN = (WEIGHT @ UPDATE) / WEIGHT.sum()
SKETCH = partial(SketchedUplink, chunk_size=250, sketch_size=100, sparsity=5, recovered=20)


def play(uplink, update=UPDATE, weight=WEIGHT, memory=None, draws=DRAWS, block=M):
    devices = len(update)
    round_ = uplink.open(update.shape[1], devices, memory, draws)
    for start in range(0, devices, block):
        part = slice(start, start + block)
        round_.send(torch.arange(devices)[part], update[part], weight[part])
    return round_.receive(), round_.traffic


def close(a, b, tolerance=SUM):
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


LINKS = {
    "ideal": IdealUplink,
    "quantized": lambda: QuantizedUplink(levels=3),
    "digital": lambda: QuantizedUplink(channel=Channel.from_snr(10.0, subchannels=4, ofdm_symbols=999)),
    "awgn": lambda: AnalogUplink(MultipleAccess.from_snr(5.0, subchannels=8, fading="none")),
    "inversion": lambda: AnalogUplink(MultipleAccess.from_snr(5.0, subchannels=8), 0.3),
    "inversion, iid": lambda: AnalogUplink(MultipleAccess.from_snr(5.0, subchannels=8, fading="iid"), 0.3),
    "blind": lambda: BlindUplink(MultipleAccess.from_snr(5.0, subchannels=8, antennas=4, csi_error_variance=0.5)),
    "blind, iid": lambda: BlindUplink(MultipleAccess.from_snr(5.0, subchannels=8, antennas=4, fading="iid")),
    "sketched": lambda: SKETCH(AnalogUplink(MultipleAccess.from_snr(5.0, subchannels=8), 0.3)),
}


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("block", [1, 3])
def test_devices_may_send_in_any_blocks(name, block):
    results = []
    for size in (M, block):
        uplink = LINKS[name]()
        memory = torch.zeros(M, D) if uplink.memory_rows(M) else None
        estimate, traffic = play(uplink, memory=memory, block=size)
        results.append((estimate, traffic, memory))
    (together, traffic, memory), (apart, traffic_apart, memory_apart) = results
    assert close(apart, together, 4 * SUM)
    assert traffic_apart.power == pytest.approx(traffic.power)
    assert (traffic_apart.bits, traffic_apart.channel_uses) == (traffic.bits, traffic.channel_uses)
    assert memory is None or torch.equal(memory, memory_apart)


@pytest.mark.parametrize("name", LINKS)
def test_one_round_is_one_set_of_random_numbers(name):
    first, second = (play(LINKS[name](), memory=torch.zeros(M, D))[0] for _ in range(2))
    assert torch.equal(first, second)
    if name not in ("ideal", "quantized", "digital"):
        assert not torch.equal(first, play(LINKS[name](), memory=torch.zeros(M, D), draws=DRAWS.at("next"))[0])


def test_the_ideal_uplink_is_the_weighted_mean():
    assert close(play(IdealUplink())[0], MEAN)


# ------------------------------------------------------------------------------------------ quantized


def test_error_feedback_loses_nothing_over_the_rounds():
    """What was received over all rounds plus what is still held is what the devices wanted to send."""
    for uplink in (LINKS["quantized"](), LINKS["digital"]()):
        memory, received = torch.zeros(M, D), torch.zeros(D)
        for t in range(5):
            received += play(uplink, memory=memory, draws=DRAWS.at(t))[0]
        held = (WEIGHT @ memory) / WEIGHT.sum()
        assert close(received + held, 5 * MEAN, 4 * SUM)
        assert memory.any()


def test_the_bits_of_the_quantized_uplink_are_those_of_its_messages():
    assert play(QuantizedUplink(levels=3))[1].bits == M * message_bits(D, 3)
    channel = Channel.from_snr(10.0, subchannels=4, ofdm_symbols=80)
    traffic = play(QuantizedUplink(channel=channel))[1]
    rates = channel.capacity(channel.gains(range(M), 80, DRAWS), 80) / M
    assert float(rates.sum()) * 0.9 < traffic.bits <= float(rates.sum())
    assert traffic.channel_uses == 80 * 4


def test_a_device_whose_link_is_too_thin_keeps_all_of_its_update():
    uplink = QuantizedUplink(channel=Channel.from_snr(0.0, ofdm_symbols=90 * M))
    memory = torch.zeros(M, D)
    estimate, traffic = play(uplink, memory=memory)
    assert 0 < traffic.silent < M
    assert sum(torch.equal(row, update) for row, update in zip(memory, UPDATE, strict=True)) == traffic.silent
    assert estimate is not None


def test_without_noise_the_quantized_uplink_is_at_top_levels():
    estimate = play(QuantizedUplink(channel=Channel.from_snr(math.inf, ofdm_symbols=M)))[0]
    assert float((estimate - MEAN).abs().max()) <= 1.01 * float(UPDATE.abs().max()) / (2**16 - 1)


# ------------------------------------------------------------------------------------------ truncated inversion


@pytest.mark.parametrize("fading", ["block", "iid", "none"])
def test_without_noise_and_threshold_inversion_is_ideal(fading):
    uplink = AnalogUplink(MultipleAccess.from_snr(math.inf, subchannels=8, fading=fading))
    assert close(play(uplink)[0], MEAN)


def test_the_uplink_transmits_with_the_requested_power():
    """The strongest sender uses P exactly; the mean over the senders is what is reported."""
    for name in ("awgn", "inversion", "blind"):
        uplink = LINKS[name]()
        energies = []
        for device in range(M):
            gains = uplink.channel.gains([device], 1, DRAWS)[:, 0]
            x = pack(WEIGHT[device] * UPDATE[device : device + 1], 8)
            if name == "inversion":
                x = torch.where(gains.abs() >= 0.3, x / gains, 0)
            energies.append(float(x.abs().square().sum()))
        traffic = play(uplink)[1]
        assert traffic.power == pytest.approx(np.mean(energies) / max(energies), rel=1e-5)  # P = 1
        assert traffic.channel_uses == math.ceil(D / 2 / 8) * 8


def test_inversion_is_its_equation_written_with_loops():
    channel = MultipleAccess.from_snr(3.0, subchannels=4)
    size, threshold = 21, 0.8
    update, symbols = UPDATE[:, :size], math.ceil(11 / 4)
    estimate, traffic = play(AnalogUplink(channel, threshold), update)
    gains = channel.gains(range(M), symbols, DRAWS)[:, 0, 0].numpy()
    noise = channel.noise((symbols, 4), DRAWS.generator("noise")).numpy()
    x = [M * float(WEIGHT[m] / WEIGHT.sum()) * pack(update[m : m + 1], 4)[0].numpy() for m in range(M)]
    active = np.abs(gains) >= threshold
    sent = [np.where(active[m], x[m] / gains[m], 0) for m in range(M)]
    alpha = min(math.sqrt(symbols * 1.0 / (np.abs(s) ** 2).sum()) for s in sent if s.any())
    heard = sum(gains[m] * alpha * sent[m] for m in range(M)) + noise
    count = active.sum(0)
    mean = np.where(count > 0, heard / alpha / np.maximum(count, 1), 0).flatten()
    assert 0 < count.min() < M
    assert np.abs(np.concatenate([mean.real[:11], mean.imag[:10]]) - estimate.numpy()).max() < 1e-5
    assert traffic.silent == sum(not row.any() for row in active)


def test_a_threshold_so_high_that_nobody_transmits_is_heard_as_nothing():
    estimate, traffic = play(AnalogUplink(MultipleAccess(subchannels=8), 100.0))
    assert estimate is None
    assert traffic.silent == M
    assert traffic.power == 0


def test_devices_with_nothing_to_say_are_heard_as_zero():
    for name in ("awgn", "blind", "ideal"):
        assert not play(LINKS[name](), torch.zeros(M, D))[0].any()


# ------------------------------------------------------------------------------------------ blind


@pytest.mark.parametrize("antennas", [1, 2, 8, 32])
@pytest.mark.parametrize(
    ("devices", "csi_error", "noise"), [(1, 0.0, 1.0), (5, 0.5, 0.0), (5, 5.0, 2.0), (20, 0.5, 50.0)]
)
def test_the_blind_uplink_has_the_error_of_its_closed_form(antennas, devices, csi_error, noise):
    """Subchannels are independent: one round is 2,000 to 20,000 samples. Mean within 4.9 of its standard errors."""
    n = 20_000 if antennas * devices <= 64 else 2_000
    channel = MultipleAccess(
        power=n * 1.0, noise_variance=noise, subchannels=n, antennas=antennas, csi_error_variance=csi_error,
        gain_variance=0.5,
    )  # fmt: skip
    size = [1.0 + 0.1 * m for m in range(devices)]
    update = torch.tensor(size)[:, None].expand(devices, 2 * n).contiguous()
    estimate, _ = play(BlindUplink(channel), update, torch.ones(devices), block=devices)
    error = pack((estimate - update.mean(0))[None], n)[0, 0].to(torch.complex128)
    alpha = math.sqrt(channel.power / (2 * n * size[-1] ** 2))
    energy = 2 * alpha**2 * sum(each**2 for each in size)
    expected = float(blind_error(channel, torch.tensor(energy), devices, alpha))
    squared = error.abs().square()
    assert abs(float(squared.mean()) - expected) <= SIGMAS * float(squared.std()) / math.sqrt(n)
    assert abs(complex(error.mean())) <= SIGMAS * math.sqrt(expected / n)  # unbiased


def test_the_closed_form_is_also_that_of_a_simulation_without_shared_code():
    rng = np.random.default_rng(0)

    def normal(variance, *shape):
        return math.sqrt(variance / 2) * (rng.standard_normal(shape) + 1j * rng.standard_normal(shape))

    trials, antennas, devices, gain, noise, csi_error, alpha = 40_000, 3, 4, 1.5, 0.7, 0.9, 2.0
    x = alpha * np.array([1 + 1j, -0.5j, 2, -1 + 0.3j])
    h = normal(gain, trials, antennas, devices)
    y = h @ x + normal(noise, trials, antennas)
    known = h.sum(2) + normal(csi_error, trials, antennas)
    error = (known.conj() * y).mean(1) / (alpha * devices * gain) - x.mean() / alpha
    channel = MultipleAccess(noise_variance=noise, gain_variance=gain, antennas=antennas, csi_error_variance=csi_error)
    expected = float(blind_error(channel, torch.tensor((np.abs(x) ** 2).sum()), devices, alpha))
    squared = np.abs(error) ** 2
    assert abs(squared.mean() - expected) <= SIGMAS * squared.std() / math.sqrt(trials)
    assert abs(error.mean()) <= SIGMAS * math.sqrt(expected / trials)


def test_the_blind_error_falls_as_one_over_the_antennas():
    n, antennas = 4000, [1, 4, 16, 64]
    errors = []
    for number in antennas:
        channel = MultipleAccess(power=n * 1.0, subchannels=n, antennas=number, csi_error_variance=1.0)
        update = torch.ones(4, 2 * n)
        estimate = play(BlindUplink(channel), update, torch.ones(4), block=4)[0]
        errors.append(float((estimate - 1).square().mean()))
    slope = np.polyfit(np.log(antennas), np.log(errors), 1)[0]
    assert abs(slope + 1) < 0.05


def test_interference_stays_at_any_snr_and_a_csi_error_of_m_doubles_it():
    quiet = MultipleAccess.from_snr(math.inf, subchannels=8000, power=8000.0, antennas=2)
    doubled = MultipleAccess.from_snr(math.inf, subchannels=8000, power=8000.0, antennas=2, csi_error_variance=4.0)
    update = torch.ones(4, 16_000)
    errors = [
        float((play(BlindUplink(channel), update, torch.ones(4), block=4)[0] - 1).square().mean())
        for channel in (quiet, doubled)
    ]
    floor = float(blind_error(quiet, torch.tensor(8.0), 4, 1.0)) / 2  # per real number
    assert errors[0] == pytest.approx(floor, rel=0.1)
    assert errors[1] == pytest.approx(2 * floor, rel=0.1)


# ------------------------------------------------------------------------------------------ sketched


def test_the_noiseless_sketched_uplink_decodes_the_sum():
    codec = Codec(250, 100, 5)
    sketches = sum(w * codec.encode(x) for w, x in zip(WEIGHT, UPDATE, strict=True)) / WEIGHT.sum()
    expected = codec.decode(sketches, (D,), sparsity=20)
    memory = torch.zeros(M, D)
    for over in (IdealUplink(), AnalogUplink(MultipleAccess.from_snr(math.inf, subchannels=8))):
        estimate, _ = play(SKETCH(over), memory=memory.clone())
        assert close(estimate, expected, 16 * SUM)


def test_a_sketch_is_the_codecs_and_what_it_dropped_is_kept():
    uplink, memory = SKETCH(IdealUplink()), torch.zeros(M, D)
    play(uplink, memory=memory)
    sent = uplink.encode(ALL, UPDATE, None, [], DRAWS)
    codec = Codec(250, 100, 5)
    for m in range(M):
        assert torch.equal(sent.payload[m].view(4, 100), codec.encode(UPDATE[m]))
        assert torch.equal(memory[m], sent.held[m])
        assert torch.equal(sent.payload[m].view(4, 100), codec.encode(UPDATE[m] - memory[m]))
        assert ((UPDATE[m] - memory[m]).view(4, 250) != 0).sum(1).tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize("size", [1, 7, 249, 1001, 7850])
def test_vectors_of_any_length_are_sketched_as_the_codec_does(size):
    uplink = SketchedUplink(IdealUplink(), chunk_size=250, sketch_size=60, sparsity=3)
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(size))
    expected = uplink.codec.encode(x[1])
    assert tuple(expected.shape) == uplink.sketch_shape(size)
    sent = uplink.encode(torch.arange(2), x, None, [], DRAWS)
    assert torch.equal(sent.payload[1].view_as(expected), expected)


def test_equal_supports_above_the_bound_are_recovered_exactly():
    update = torch.zeros(M, D)
    update[:, ::250] = torch.linspace(1, 2, M)[:, None]
    estimate, _ = play(SketchedUplink(IdealUplink(), chunk_size=250, sketch_size=60, sparsity=2), update)
    assert close(estimate, (WEIGHT @ update) / WEIGHT.sum(), 1e-4)  # the recovery's ridge of 1e-5


def test_the_residual_holds_what_was_received_and_not_recovered():
    uplink = SKETCH(IdealUplink(), residual=1.0)
    recovered = torch.zeros(4, 100)
    received = torch.zeros(4, 100)
    plain = SKETCH(IdealUplink())
    for t in range(4):
        update = UPDATE.roll(t, 0)
        received += (WEIGHT @ plain.codec.encode_rows(update)[0].flatten(1)).view(4, 100) / WEIGHT.sum()
        estimate, _ = play(uplink, update)
        recovered += plain.codec.encode_rows(estimate[None], sparsity=20)[0][0]
    assert close(recovered + uplink.state()["residual"], received, 1e-4)
    other = SKETCH(IdealUplink(), residual=1.0)
    other.load_state({name: value.clone() for name, value in uplink.state().items()}, D)
    assert torch.equal(play(other)[0], play(uplink)[0])


def test_sketches_need_fewer_symbols_and_can_be_made_to_fit():
    channel = MultipleAccess.from_snr(20.0, subchannels=8, ofdm_symbols=20)
    with pytest.raises(ValueError, match="1000 uncoded numbers need 63 OFDM symbols"):
        play(AnalogUplink(channel))
    k = sketch_size_that_fits(D, 250, channel)
    assert k == 2 * 20 * 8 // 4
    uplink = SketchedUplink(AnalogUplink(channel), chunk_size=250, sketch_size=k, sparsity=5)
    assert play(uplink)[1].channel_uses <= 160
    with pytest.raises(ValueError, match="a budget of 2 numbers does not hold one for each of 4 chunks"):
        sketch_size_that_fits(D, 250, MultipleAccess(ofdm_symbols=1))


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: SketchedUplink(QuantizedUplink(levels=1)), TypeError, "an uncoded link, got QuantizedUplink"),
        (lambda: SketchedUplink(IdealUplink(), recovered=300), ValueError, r"\[1, sketch_size=256\], got 300"),
        (lambda: SketchedUplink(IdealUplink(), residual=1.5), ValueError, r"residual must be in \[0, 1\], got 1.5"),
        (lambda: QuantizedUplink(), ValueError, "either levels or channel"),
        (lambda: QuantizedUplink(levels=0), ValueError, "levels must be at least 1, got 0"),
        (lambda: QuantizedUplink(channel=Channel()), ValueError, "a digital link needs a budget"),
        (lambda: AnalogUplink(MultipleAccess(), -1.0), ValueError, "threshold must not be negative, got -1.0"),
        (lambda: AnalogUplink(MultipleAccess(), math.nan), ValueError, "threshold must be finite, got nan"),
        (lambda: AnalogUplink(MultipleAccess(antennas=2)), ValueError, "for antennas=1, got 2"),
        (lambda: BlindUplink(MultipleAccess(fading="none")), ValueError, "gains that fade independently"),
        (
            lambda: IdealUplink().load_state({"residual": MEAN}, D),
            ValueError,
            "a state must hold nothing, got residual",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()

import math

import pytest
import torch

from federated.channel import Channel, MultipleAccess
from federated.downlink import AnalogDownlink, DigitalDownlink, IdealDownlink, SelectionDownlink
from federated.draws import Draws
from federated.metrics import evaluate
from federated.round import World, play
from federated.server import Server
from federated.uplink import AnalogUplink, BlindUplink, IdealUplink, QuantizedUplink, SketchedUplink
from tests.federated.small import M, small_data, small_parts, training
from tests.tolerances import SUM

DATA, PARTS, TEST = small_data(), small_parts(), small_data(80, seed=1)
DOWNLINKS = {
    "ideal": IdealDownlink,
    "digital": lambda: DigitalDownlink(Channel.from_snr(20.0, subchannels=8, ofdm_symbols=40)),
    "analog": lambda: AnalogDownlink(Channel.from_snr(20.0, subchannels=8)),
    "selection": lambda: SelectionDownlink(Channel.from_snr(20.0, subchannels=8, ofdm_symbols=40), 3),
}
UPLINKS = {
    "ideal": IdealUplink,
    "quantized": lambda: QuantizedUplink(levels=7),
    "analog": lambda: AnalogUplink(MultipleAccess.from_snr(20.0, subchannels=8), 0.2),
    "blind": lambda: BlindUplink(MultipleAccess.from_snr(20.0, subchannels=8, antennas=64)),
    "sketched": lambda: SketchedUplink(
        AnalogUplink(MultipleAccess.from_snr(20.0, subchannels=8), 0.2),
        chunk_size=65, sketch_size=50, sparsity=10, recovered=20,
    ),
}  # fmt: skip


def world(downlink=None, uplink=None, **arguments):
    train = arguments.pop("training", None) or training()
    downlink, uplink = downlink or IdealDownlink(), uplink or IdealUplink()
    theta = train.flat.read(train.model)
    rows, errors = downlink.memory_rows(M), uplink.memory_rows(M)
    return World(
        server=Server(theta),
        training=train,
        downlink=downlink,
        uplink=uplink,
        data=arguments.pop("data", DATA),
        parts=PARTS,
        draws=Draws((0,)),
        theta_hat=theta.repeat(rows, 1) if rows else None,
        error=torch.zeros(errors, len(theta)) if errors else None,
        **arguments,
    )


def test_an_ideal_round_is_federated_averaging_written_with_a_loop():
    here = world()
    theta, train = here.server.theta.clone(), here.training
    play(here, 1)
    moved = torch.zeros_like(theta)
    for m, part in enumerate(PARTS):
        batches = train.batches(DATA, PARTS, [m], Draws((0,)).at("round", 1))
        model = theta.clone().requires_grad_()
        for step in range(train.steps):
            rows = batches.index[0, step]
            weight = model[:256].view(4, 64)
            logits = DATA["pixel_values"][rows].flatten(1) @ weight.T + model[256:]
            loss = torch.nn.functional.cross_entropy(logits, DATA["labels"][rows])
            model = (model - 0.1 * torch.autograd.grad(loss, model)[0]).detach().requires_grad_()
        moved += len(part) / 120 * (model.detach() - theta)
    assert (here.server.theta - theta - moved).abs().max() <= 4 * SUM * moved.abs().max()


@pytest.mark.parametrize("down", DOWNLINKS)
@pytest.mark.parametrize("up", UPLINKS)
def test_any_downlink_goes_with_any_uplink_and_learns(down, up):
    here = world(DOWNLINKS[down](), UPLINKS[up]())
    rows = [play(here, number) for number in range(1, 21)]
    here.training.flat.write(here.server.theta, here.training.model)
    assert evaluate(here.training.model, TEST)["accuracy"] > 0.8  # chance is 0.25
    assert all(not row.skipped for row in rows)
    assert rows[-1].nmse_down < (1e-12 if down == "ideal" else 0.3)
    assert (rows[-1].bits_down is None) == (down in ("ideal", "analog"))
    assert (rows[-1].bits_up is None) == (up != "quantized")
    assert (rows[-1].power_up > 0) == (up in ("analog", "blind", "sketched"))


@pytest.mark.parametrize("down", DOWNLINKS)
@pytest.mark.parametrize("up", UPLINKS)
def test_devices_may_be_batched_in_any_number(down, up):
    """Up to the order of sums, which a device's quantizer can turn into another level once in a while."""
    first, second = (world(DOWNLINKS[down](), UPLINKS[up](), devices_at_once=number) for number in (M, 2))
    for here in (first, second):
        play(here, 1)
    scale = float(first.server.theta.abs().max())
    differing = (first.server.theta - second.server.theta).abs() > 8 * SUM * scale
    assert int(differing.sum()) <= (3 if up in ("quantized", "sketched") else 0)


def test_a_device_with_a_nan_is_dropped_and_counted_and_never_averaged():
    data = dict(DATA, pixel_values=DATA["pixel_values"].clone())
    data["pixel_values"][PARTS[2]] = torch.nan
    here, without = world(data=data), world()
    row = play(here, 1)
    assert (row.dropped, row.participants) == (1, M - 1)
    without.parts = [part for m, part in enumerate(PARTS) if m != 2]
    assert here.server.theta.isfinite().all()
    theta = world().server.theta
    expected = sum(
        len(PARTS[m]) / 100 * world().training.updates(
            theta[None], world().training.batches(DATA, PARTS, [m], Draws((0,)).at("round", 1)))[0][0]
        for m in (0, 1, 3, 4)
    )  # fmt: skip
    assert (here.server.theta - theta - expected).abs().max() <= 4 * SUM * expected.abs().max()


@pytest.mark.parametrize("up", ["quantized", "sketched"])
def test_a_nan_never_reaches_what_devices_remember(up):
    data = dict(DATA, pixel_values=DATA["pixel_values"].clone())
    data["pixel_values"][PARTS[2]] = torch.inf
    here = world(uplink=UPLINKS[up](), data=data)
    play(here, 1)
    assert here.error.isfinite().all()
    assert not here.error[2].any()


def test_all_devices_failing_is_a_skipped_round():
    here = world(data=dict(DATA, pixel_values=DATA["pixel_values"] * torch.nan))
    theta = here.server.theta.clone()
    row = play(here, 1)
    assert (row.dropped, row.participants, row.skipped) == (
        M,
        0,
        "no update reached the server: of 5 devices 5 not finite or too large",
    )
    assert torch.equal(here.server.theta, theta)


def test_late_devices_are_counted_and_left_out():
    here = world(late=0.5, uplink=QuantizedUplink(levels=3))
    rows = [play(here, number) for number in range(1, 9)]
    assert all(row.late + row.participants == M for row in rows)
    assert 0 < sum(row.late for row in rows) < 8 * M


def test_a_late_device_leaves_its_share_of_the_link_unused():
    """Shares are dealt before anybody is late: with 42 symbols the first two of five devices have one more."""
    channel = Channel.from_snr(25.0, subchannels=8, ofdm_symbols=42, fading="none")
    here = world(late=0.5, uplink=QuantizedUplink(channel=channel))
    asked = []
    encode = here.uplink.encode
    here.uplink.encode = lambda devices, update, held, budget, draws: (
        asked.append((devices.tolist(), budget)) or encode(devices, update, held, budget, draws)
    )
    row = play(here, 1)
    symbol = float(channel.capacity(channel.gains([0], 1, Draws((0,))), 1))
    ((devices, budget),) = asked
    assert 0 < row.late < M
    assert not {0, 1} <= set(devices)  # so that shares dealt to those on time alone would differ
    assert budget == [math.floor(symbol * (9 if m < 2 else 8)) for m in devices]


def test_only_asked_devices_take_part():
    here = world(asked=2, downlink=DOWNLINKS["selection"]())
    play(here, 1)
    before = here.theta_hat.clone()
    row = play(here, 2)
    assert row.participants == 2
    assert (here.theta_hat != before).any(1).sum() == 2


def test_a_downlink_that_serves_nobody_skips_the_round():
    here = world(SelectionDownlink(Channel.from_snr(-40.0, ofdm_symbols=4), 2))
    here.server.theta += 1.0
    row = play(here, 1)
    assert row.skipped == "the downlink could serve no device: too thin for one entry"
    assert (row.participants, row.silent_down) == (0, 2)


def test_a_threshold_at_which_nobody_transmits_skips_the_round():
    row = play(world(uplink=AnalogUplink(MultipleAccess(), 50.0)), 1)
    assert (row.skipped, row.silent_up) == ("no update reached the server: of 5 devices 5 silent", M)

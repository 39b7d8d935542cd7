"""The round on Flower against the simulator's, in one process; test_flower_processes.py tests it on the engine."""

import math

import pytest
import torch

pytest.importorskip("flwr.app", reason="Flower needs Python 3.11")

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from federated.channel import Channel, MultipleAccess
from federated.downlink import AnalogDownlink, DigitalDownlink, IdealDownlink, SelectionDownlink
from federated.flower import Device, RadioStrategy, arrays, client_app, tensor_of
from federated.simulate import Simulation
from federated.uplink import AnalogUplink, BlindUplink, IdealUplink, QuantizedUplink, SketchedUplink
from tests.federated.small import M, small_data, small_parts, training
from tests.tolerances import SUM

DATA, PARTS = small_data(), small_parts()


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """What the engine tells a process about itself, and messages carry."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class LocalGrid(Grid):
    """Runs every node's ClientApp here, with a context of its own, as a SuperNode does."""

    def __init__(self, app, lost=(), lost_rounds=range(100)):
        self.app, self.lost, self.lost_rounds, self.travelled = app, lost, lost_rounds, []
        self.contexts = {
            100 + m: Context(1, 100 + m, {"partition-id": m}, RecordDict(), {}) for m in reversed(range(M))
        }

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            lost = self.contexts[node].node_config["partition-id"] in self.lost
            train = message.metadata.message_type == "train"
            if lost and train and int(message.content["config"]["round"]) in self.lost_rounds:
                continue
            reply = self.app(message, self.contexts[node])
            if "up" in reply.content:
                self.travelled.append(reply.content["up"].count_bytes())
            replies.append(reply)
        return replies

    def set_run(self, run): ...
    def create_message(self, *arguments): ...
    def push_messages(self, messages): ...
    def pull_messages(self, message_ids): ...

    @property
    def run(self): ...


def device_of(data=DATA):
    def open_device(context):
        m = context.node_config["partition-id"]
        return Device(m, training(), {name: column[PARTS[m]] for name, column in data.items()})

    return open_device


def on_flower(downlink, uplink, rounds=4, data=DATA, lost=(), lost_rounds=range(100), **arguments):
    grid = LocalGrid(client_app(device_of(data), lambda context: uplink), lost, lost_rounds)
    rows = []
    strategy = RadioStrategy(
        M, downlink=downlink, uplink=uplink, on_round=lambda number, row: rows.append(row), **arguments
    )
    train, grid.strategy = training(), strategy
    result = strategy.start(grid, arrays(theta=train.flat.read(train.model)), num_rounds=rounds)
    return tensor_of(result.arrays, "theta"), rows, grid


DOWNLINKS = {
    "ideal": IdealDownlink,
    "digital": lambda: DigitalDownlink(Channel.from_snr(20.0, subchannels=8, ofdm_symbols=40)),
    "analog": lambda: AnalogDownlink(Channel.from_snr(20.0, subchannels=8)),
    "selection": lambda: SelectionDownlink(Channel.from_snr(20.0, subchannels=8, ofdm_symbols=40), 3),
}
UPLINKS = {
    "ideal": IdealUplink,
    "quantized": lambda: QuantizedUplink(levels=7),
    "thin": lambda: QuantizedUplink(channel=Channel.from_snr(20.0, subchannels=8, ofdm_symbols=40)),
    "analog": lambda: AnalogUplink(MultipleAccess.from_snr(20.0, subchannels=8), 0.2),
    "blind": lambda: BlindUplink(MultipleAccess.from_snr(20.0, subchannels=8, antennas=64)),
    "sketched": lambda: SketchedUplink(IdealUplink(), chunk_size=65, sketch_size=30, sparsity=5, residual=0.9),
}


@pytest.mark.parametrize(("down", "up"), [*((d, "ideal") for d in DOWNLINKS), *(("ideal", u) for u in UPLINKS)])
def test_rounds_on_flower_are_the_simulators(down, up):
    """Up to the order of sums, which a quantizer can turn into another level once in a while."""
    theta, rows, _ = on_flower(DOWNLINKS[down](), UPLINKS[up]())
    sim = Simulation(training(), DATA, PARTS, downlink=DOWNLINKS[down](), uplink=UPLINKS[up]())
    expected = list(sim.run(4, progress=False))
    differing = (theta - sim.theta).abs() > 16 * SUM * sim.theta.abs().max()
    assert int(differing.sum()) <= (0 if (down, up) == ("ideal", "ideal") else 8)
    for row, simulated in zip(rows, expected, strict=True):
        assert row["participants"] == simulated["participants"]
        for name in ("bits_down", "bits_up"):
            assert row[name] == (-1 if simulated[name] is None else simulated[name])
        assert row["train_loss"] == pytest.approx(simulated["train_loss"], rel=1e-3)


def test_one_ideal_round_is_equal_to_the_last_bits():
    theta, _, _ = on_flower(IdealDownlink(), IdealUplink(), rounds=1)
    sim = Simulation(training(), DATA, PARTS)
    sim.step()
    assert (theta - sim.theta).abs().max() <= SUM * sim.theta.abs().max()


def test_sketches_are_what_travels():
    _, rows, grid = on_flower(IdealDownlink(), UPLINKS["sketched"](), rounds=1)
    _, dense_rows, dense = on_flower(IdealDownlink(), IdealUplink(), rounds=1)
    numbers, size = 4 * 30, 260
    overhead = dense.travelled[0] - 4 * size
    assert 0 < overhead < 300
    assert abs(grid.travelled[0] - 4 * numbers - overhead) < 10
    assert rows[0]["bytes_up"] == sum(grid.travelled) < 0.7 * dense_rows[0]["bytes_up"]


def test_devices_remember_in_their_context():
    _, _, grid = on_flower(DOWNLINKS["selection"](), QuantizedUplink(levels=3), rounds=3)
    sim = Simulation(training(), DATA, PARTS, downlink=DOWNLINKS["selection"](), uplink=QuantizedUplink(levels=3))
    list(sim.run(3, progress=False))
    for context in grid.contexts.values():
        m = context.node_config["partition-id"]
        if "theta_hat" in context.state:
            held = tensor_of(context.state["theta_hat"], "theta_hat")
            assert torch.allclose(held, sim.world.theta_hat[m], atol=1e-4)
        else:
            assert not sim.world.theta_hat[m].any()  # never selected: where training starts
        assert ("error" in context.state) == bool(sim.world.error[m].any())


def test_every_device_listens_to_a_common_digital_downlink():
    _, rows, grid = on_flower(DOWNLINKS["digital"](), IdealUplink(), asked=2, rounds=3)
    assert [row["participants"] for row in rows] == [2, 2, 2]
    held = [tensor_of(context.state["theta_hat"], "theta_hat") for context in grid.contexts.values()]
    assert all(torch.equal(held[0], each) for each in held)


def test_a_device_with_a_nan_is_dropped_and_one_that_is_lost_is_late():
    data = dict(DATA, pixel_values=DATA["pixel_values"].clone())
    data["pixel_values"][PARTS[1]] = math.nan
    theta, rows, _ = on_flower(IdealDownlink(), QuantizedUplink(levels=3), data=data, lost=(4,))
    assert theta.isfinite().all()
    assert all((row["dropped"], row["late"], row["participants"]) == (1, 1, 3) for row in rows)


@pytest.mark.parametrize("down", ["digital", "selection"])
def test_a_node_that_was_away_comes_back_with_the_estimate_that_the_server_thinks_it_holds(down):
    _, _, grid = on_flower(DOWNLINKS[down](), IdealUplink(), rounds=6, lost=(1, 2), lost_rounds=(1, 3))
    memory, held = grid.strategy.theta_hat, {}
    for context in grid.contexts.values():
        if "theta_hat" in context.state:
            held[context.node_config["partition-id"]] = tensor_of(context.state["theta_hat"], "theta_hat")
    assert set(held) == set(range(M))
    assert all(torch.allclose(each, memory[m % len(memory)], atol=1e-6) for m, each in held.items())


@pytest.mark.parametrize("down", ["digital", "selection"])
def test_a_node_that_was_started_anew_is_told_the_estimate_that_the_server_thinks_it_holds(down):
    grid = LocalGrid(client_app(device_of(), lambda context: IdealUplink()))

    def restart(number, row):
        assert row["participants"] == (3 if down == "selection" else M)
        if number == 3:  # every node: with another id, and nothing remembered
            contexts = [Context(1, 500 + m, {"partition-id": m}, RecordDict(), {}) for m in range(M)]
            grid.contexts = {context.node_id: context for context in contexts}

    train, strategy = training(), RadioStrategy(M, downlink=DOWNLINKS[down](), on_round=restart)
    strategy.start(grid, arrays(theta=train.flat.read(train.model)), num_rounds=8)
    for context in grid.contexts.values():
        held = tensor_of(context.state["theta_hat"], "theta_hat")
        m = context.node_config["partition-id"]
        assert torch.allclose(held, strategy.theta_hat[m % len(strategy.theta_hat)], atol=1e-6)


def test_a_round_that_serves_nobody_is_skipped():
    start = training().flat.read(training().model)
    thin = SelectionDownlink(Channel.from_snr(-40.0, ofdm_symbols=3), 2)
    theta, rows, _ = on_flower(thin, IdealUplink(), rounds=2)
    assert [row["skipped"] for row in rows] == [1, 1]
    assert torch.equal(theta, start)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=rf"asked must be in \[1, num_devices={M}\], got {M + 1}"):
        RadioStrategy(M, asked=M + 1)
    grid = LocalGrid(client_app(device_of()))
    start = arrays(theta=torch.zeros(260))
    with pytest.raises(RuntimeError, match=f"{M + 1} nodes are needed, {M} came in 0 s"):
        RadioStrategy(M + 1, timeout=0.1).start(grid, start, num_rounds=1)

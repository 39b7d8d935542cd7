"""Flower's server leaves out what makes no sense, says why, and lets a node come back."""

import logging
import math

import numpy as np
import pytest
import torch

pytest.importorskip("flwr.app", reason="Flower needs Python 3.11")

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.supercore.task_identity import TaskIdentity

from federated.downlink import DownlinkRound, IdealDownlink
from federated.flower import RadioStrategy, arrays, receive, tensor_of
from federated.uplink import SketchedUplink

SIZE, DEVICES = 30, 4
SOUND = {"samples": 10, "loss": 1.0, "finite": 1, "able": 1, "bits": -1}
LEFT_OUT = object()


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """What the engine tells a process about itself, and messages carry."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def reply(message, device, changed=(), up=None):
    """What a device answers, but for what is changed; None takes a number out."""
    numbers = {"device": device, **SOUND, **dict(changed)}
    content = {"metrics": MetricRecord({name: value for name, value in numbers.items() if value is not None})}
    if message.metadata.message_type == MessageType.TRAIN:
        content["up"] = arrays(payload=torch.full((SIZE,), 0.1)) if up is None else up
    return Message(RecordDict(content), reply_to=message)


class Nodes:
    """Nodes by their id, each with its device, which answer as `answer` says (default: sound)."""

    def __init__(self, answer=None, devices=DEVICES):
        self.nodes, self.answer, self.asked = {100 + m: m for m in range(devices)}, answer, []

    def get_node_ids(self):
        return list(self.nodes)

    def send_and_receive(self, messages, timeout=None):
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.asked.append((node, message.metadata.message_type, message.content))
            made = reply(message, self.nodes.get(node)) if self.answer is None else self.answer(node, message)
            replies += made if isinstance(made, list) else [made]
        return [each for each in replies if each is not None]


def play(grid, strategy=None, rounds=1, devices=DEVICES, **arguments):
    strategy = strategy or RadioStrategy(devices, timeout=0.2, **arguments)
    theta, rows = arrays(theta=torch.zeros(SIZE)), []
    for number in range(1, rounds + 1):
        messages = list(strategy.configure_train(number, theta, ConfigRecord({}), grid))
        theta, metrics = strategy.aggregate_train(number, grid.send_and_receive(messages))
        rows.append(dict(metrics))
        assert sum(rows[-1][name] for name in ("participants", "dropped", "failed", "late")) == devices
    return tensor_of(theta, "theta"), rows, strategy


def evil_numbers():
    """Every number of a reply, missing and in every way that makes no sense."""
    sensible = {"loss": (-30, -1, 2, 2.5, 2**60), "bits": (-1, 2), "device": ()}
    for name in ("device", *SOUND):
        for value in (None, math.nan, math.inf, -math.inf, -1, -30, 2, 2.5, 2**60, [1, 1], []):
            if value not in sensible.get(name, ()) and (name, value) != ("samples", 2):
                yield name, value
        if name != "loss":
            yield name, 1.0


UPS = {
    "NaN": arrays(payload=torch.full((SIZE,), math.nan)),
    "inf": arrays(payload=torch.full((SIZE,), math.inf)),
    "beyond sums": arrays(payload=torch.full((SIZE,), 1e37)),
    "fp64": arrays(payload=torch.ones(SIZE).double()),
    "whole numbers": arrays(payload=torch.ones(SIZE).long()),
    "two dimensions": arrays(payload=torch.ones(1, SIZE)),
    "none": arrays(payload=torch.ones(())),
    "too long": arrays(payload=torch.ones(SIZE + 1)),
    "too short": arrays(payload=torch.ones(SIZE - 1)),
    "empty": arrays(payload=torch.ones(0)),
    "another name": arrays(update=torch.ones(SIZE)),
    "nothing": ArrayRecord(),
    "no arrays": MetricRecord({"payload": 1}),
    "text": ArrayRecord({"payload": Array(np.full(SIZE, "x"))}),
    "bytes": ArrayRecord({"payload": Array("float32", (SIZE,), "numpy.ndarray", b"garbage")}),
    "cut off": ArrayRecord({"payload": Array("float32", (SIZE,), "numpy.ndarray", b"\x93NUMPY\x01\x00v\x00{'descr'")}),
    "a pickle": ArrayRecord({"payload": Array("object", (1,), "pickle", b"\x80\x04N.")}),
}


def with_one_odd(**odd):
    """A grid whose device 0 answers as told; the others move θ by 0.1."""

    def answer(node, message):
        train = message.metadata.message_type == MessageType.TRAIN
        return reply(message, node - 100, **(odd if train and node == 100 else {}))

    return Nodes(answer)


@pytest.mark.parametrize(("name", "value"), list(evil_numbers()))
def test_a_reply_with_a_senseless_number_is_left_out_and_named(name, value):
    theta, (row,), strategy = play(with_one_odd(changed={name: value}, up=arrays(payload=torch.full((SIZE,), 0.9))))
    assert torch.allclose(theta, torch.full((SIZE,), 0.1))
    assert (row["dropped"], row["participants"]) == (1, DEVICES - 1)
    assert name in strategy.left_out[0]


@pytest.mark.parametrize("up", UPS)
def test_a_payload_that_cannot_be_added_up_is_left_out(up, caplog):
    with caplog.at_level(logging.WARNING, "flwr"):
        theta, (row,), strategy = play(with_one_odd(up=UPS[up]))
    assert torch.allclose(theta, torch.full((SIZE,), 0.1))
    assert (row["dropped"], row["participants"], row["skipped"]) == (1, DEVICES - 1, 0)
    assert strategy.left_out.keys() == {0}
    assert f"round 1: device 0 is left out: {strategy.left_out[0]}" in caplog.text


def test_sketches_are_checked_by_the_size_of_a_sketch():
    uplink = SketchedUplink(over=RadioStrategy(1).uplink, chunk_size=10, sketch_size=5, sparsity=2)
    for up, dropped in ((None, DEVICES), (arrays(payload=torch.ones(15)), DEVICES - 1)):
        _, (row,), _ = play(with_one_odd(up=up), uplink=uplink)
        assert row["dropped"] == dropped


def test_who_finds_its_own_update_broken_is_dropped():
    theta, (row,), _ = play(with_one_odd(changed={"finite": 0, "loss": math.nan, "able": None, "bits": None}))
    assert torch.allclose(theta, torch.full((SIZE,), 0.1))
    assert row["dropped"] == 1


def test_an_answer_counts_once_and_from_who_was_asked():
    """Node 100 answers twice, node 101 in the name of device 2, node 103 for a node that nobody knows."""

    def answer(node, message):
        if message.metadata.message_type != MessageType.TRAIN:
            return reply(message, node - 100)
        if node == 100:
            return [reply(message, 0), reply(message, 0, up=arrays(payload=torch.full((SIZE,), 9.0)))]
        if node == 101:
            return reply(message, 2, up=arrays(payload=torch.full((SIZE,), 9.0)))
        stranger = reply(message, 3, up=arrays(payload=torch.full((SIZE,), 9.0)))
        stranger.metadata._src_node_id = 555
        return [reply(message, 2)] if node == 102 else [stranger]

    theta, (row,), strategy = play(Nodes(answer))
    assert torch.allclose(theta, torch.full((SIZE,), 0.1))
    assert (row["participants"], row["dropped"], row["late"]) == (2, 1, 1)
    assert strategy.left_out == {1: "device must be 1, as which the node was asked, got 2"}


def test_an_error_is_told_from_being_late_and_its_reason_is_said(caplog):
    def answer(node, message):
        if message.metadata.message_type != MessageType.TRAIN or node > 101:
            return reply(message, node - 100)
        return (
            Message(Error(code=2, reason="KeyError:\n\x1b[31m'pixel_values'"), reply_to=message)
            if node == 100
            else None
        )

    with caplog.at_level(logging.INFO, "flwr"):
        _, (row,), strategy = play(Nodes(answer))
    assert (row["failed"], row["late"], row["participants"], row["dropped"]) == (1, 1, 2, 0)
    assert strategy.left_out == {0: "its node failed: KeyError: ?[31m'pixel_values'"}
    assert "device 0 is left out: its node failed: KeyError" in caplog.text
    assert "devices [1] did not answer" in caplog.text


@pytest.mark.parametrize("odd", [None, 1.0, DEVICES, -1, 0, [0]])
def test_a_node_that_is_no_device_stops_nobody(odd, caplog):
    """A fifth node, in the place of the fourth: it says nothing, or the number of another or of none."""

    def answer(node, message):
        return reply(message, node - 100, changed={"device": odd} if node == 103 else {})

    theta, (row,), _ = play(Nodes(answer))
    assert torch.allclose(theta, torch.full((SIZE,), 0.1))
    assert (row["participants"], row["late"]) == (DEVICES - 1, 1)
    assert "node 103" in caplog.text
    assert "devices [3] have no node" in caplog.text


def test_without_a_single_device_there_is_no_run():
    with pytest.raises(RuntimeError, match="the nodes must be devices 0 to 3, none of 4 is"):
        play(Nodes(lambda node, message: Message(Error(code=1, reason="no"), reply_to=message)))


@pytest.mark.parametrize("lingers", [False, True])
def test_a_node_that_was_restarted_takes_part_again(lingers):
    """It has another id; the old one may still be listed for a while, and does not answer."""
    dead = set()
    grid = Nodes(lambda node, message: None if node in dead else reply(message, grid.nodes[node]))
    strategy, theta, rows = RadioStrategy(DEVICES), arrays(theta=torch.zeros(SIZE)), []
    for number in range(1, 6):
        if number == 2:
            dead = {101}
            grid.nodes = {node: m for node, m in grid.nodes.items() if lingers or node != 101} | {999: 1}
        messages = list(strategy.configure_train(number, theta, ConfigRecord({}), grid))
        theta, metrics = strategy.aggregate_train(number, grid.send_and_receive(messages))
        rows.append(metrics["late"])
    assert rows == [0, int(lingers), 0, 0, 0]
    assert len([node for node, kind, _ in grid.asked if kind == MessageType.QUERY]) == DEVICES + 1


def test_nobody_takes_the_place_of_a_device_that_answers():
    grid = Nodes(lambda node, message: reply(message, 1 if node == 666 else node - 100))
    strategy = RadioStrategy(DEVICES)
    play(grid, strategy)
    grid.nodes[666] = 1
    play(grid, strategy, rounds=3)
    assert {node for node, kind, _ in grid.asked if kind == MessageType.TRAIN} == {100, 101, 102, 103}


def test_a_round_that_serves_nobody_leaves_no_device_silent():
    """So that every device keeps its node, another that says it is the same notwithstanding."""

    class Sometimes(IdealDownlink):
        served = True

        def send(self, theta, asked, *rest):
            return super().send(theta, asked, *rest) if self.served else DownlinkRound(asked[:0])

    grid = Nodes(lambda node, message: reply(message, 1 if node == 666 else node - 100))
    strategy = RadioStrategy(DEVICES, downlink=Sometimes())
    play(grid, strategy)
    grid.nodes[666] = 1
    strategy.downlink.served = False
    messages = list(strategy.configure_train(2, ArrayRecord(), ConfigRecord({}), grid))
    assert messages == []
    assert strategy.aggregate_train(2, [])[1]["skipped"] == 1
    strategy.downlink.served = True
    _, (row,), _ = play(grid, strategy)
    assert row["participants"] == DEVICES
    assert {node for node, kind, _ in grid.asked if kind == MessageType.TRAIN} == {100, 101, 102, 103}


@pytest.mark.parametrize(
    ("down", "sentence"),
    [
        ({"value": torch.ones(2), "index": torch.tensor([0, SIZE])}, r"positions must be in \[0, 30\), got 0 to 30"),
        ({"value": torch.ones(2), "index": torch.tensor([-1, 3])}, "got -1 to 3"),
        ({"value": torch.ones(2), "index": torch.ones(2)}, "int64 positions"),
        ({"value": torch.ones(SIZE + 1)}, "a difference must be"),
        ({"value": torch.ones(SIZE).double()}, "a difference must be"),
        ({"value": torch.full((SIZE,), math.nan)}, "the estimate must be finite"),
        ({"value": torch.full((SIZE,), 3e38)}, "the estimate must be finite"),
        ({"theta": torch.ones(SIZE).double()}, r"theta must be \(d,\) in float32"),
        ({"theta": torch.ones(2, SIZE)}, r"theta must be \(d,\) in float32"),
    ],
)
def test_a_device_keeps_its_estimate_when_what_comes_makes_none(down, sentence):
    context = Context(1, 100, {}, RecordDict({"theta_hat": arrays(theta_hat=torch.full((SIZE,), 3e38))}), {})
    message = Message(RecordDict({"down": arrays(**down)}), 100, MessageType.TRAIN)
    with pytest.raises(ValueError, match=sentence):
        receive(message, context, None)
    assert torch.equal(tensor_of(context.state["theta_hat"], "theta_hat"), torch.full((SIZE,), 3e38))
    with pytest.raises(ValueError, match="a node that holds an estimate, this one holds none"):
        receive(
            Message(RecordDict({"down": arrays(value=torch.ones(SIZE))}), 100, MessageType.TRAIN),
            Context(1, 100, {}, RecordDict(), {}),
            None,
        )

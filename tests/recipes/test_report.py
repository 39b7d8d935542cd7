"""Bytes are those really held, and files are written whole or not at all."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import report


def stepped(optimizer_class, **kwargs):
    layer = torch.nn.Linear(64, 32)
    optimizer = optimizer_class(layer.parameters(), **kwargs)
    layer(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    return layer, optimizer


def test_adamw_holds_eight_bytes_a_parameter_and_its_step_counters():
    layer, optimizer = stepped(torch.optim.AdamW)
    count = sum(p.numel() for p in layer.parameters())
    assert report.state_bytes(optimizer) == report.ADAMW_BYTES_PER_PARAMETER * count + 2 * 4


def test_sgd_holds_nothing():
    assert report.state_bytes(stepped(torch.optim.SGD, lr=0.1)[1]) == 0


def test_an_optimizer_that_counts_itself_is_believed():
    from sgc import SGC

    _, optimizer = stepped(SGC)
    assert report.state_bytes(optimizer) == optimizer.state_bytes() > 0


def test_tensors_inside_objects_of_the_state_are_counted():
    class Projector:
        def __init__(self):
            self.matrix, self.itself = torch.zeros(10), self

    assert report.tensor_bytes(report.tensors_in({"a": [Projector()], "b": torch.zeros(3)})) == 52


def test_tied_weights_count_once():
    weight = torch.nn.Parameter(torch.zeros(8))
    assert report.tensor_bytes([weight, weight]) == 32


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    report.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        report.write_json(path, {(1, 2): 3})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


NUMBERS = st.floats() | st.integers() | st.booleans() | st.none() | st.text()


NESTED = st.recursive(NUMBERS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@settings(max_examples=20)
@given(st.dictionaries(st.text(), NESTED, max_size=3))
def test_whatever_is_written_is_json_and_finite_numbers_come_back(tmp_path_factory, content):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    def same(left, right):
        if isinstance(left, dict):
            return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
        if isinstance(left, list):
            return len(left) == len(right) and all(map(same, left, right))
        return right is None if isinstance(left, float) and not math.isfinite(left) else left == right

    path = tmp_path_factory.getbasetemp() / "any.json"
    report.write_json(path, content)
    assert same(content, json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse))


def test_what_was_not_measured_is_a_dash():
    memory = {"weights": 4_000_000, "gradients": None, "optimizer_state": 1_000_000, "adamw_state": 8_000_000}
    run = {"name": "sgc", "after": {"loss": 0.5}, "steps": 10, "seconds": 3.2, "memory": memory}
    assert "4.00 MB          –          1.00 MB" in report.report({"before": {}, "runs": [run]})


def test_the_tables_hold_every_run_and_its_share_of_adamws_state():
    memory = {"weights": 4_000_000, "gradients": 4_000_000, "optimizer_state": 1_000_000, "adamw_state": 8_000_000}
    run = {"name": "sgc", "after": {"loss": 0.5}, "steps": 10, "seconds": 3.2, "memory": memory}
    text = report.report({"before": {"loss": 2.0}, "runs": [run]})
    assert "before     2.000" in text
    assert "after sgc  0.500     10   3 s" in text
    assert "0.125 × 8.00 MB" in text

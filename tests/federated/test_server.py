import pytest
import torch

from federated.draws import Draws
from federated.server import Server, draw_asked, draw_late

DRAWS = Draws((0, "round"))
ONES = torch.ones(3)


def test_fedavg_adds_the_mean_update():
    server = Server(torch.zeros(3), lr=0.5)
    server.step(ONES)
    server.step(2 * ONES)
    assert server.theta.tolist() == [1.5] * 3


def test_momentum_is_a_geometric_sum_and_survives_its_state():
    server = Server(torch.zeros(3), momentum=0.5)
    server.step(ONES)
    other = Server(torch.zeros(3), momentum=0.5)
    other.load_state(server.state())
    for each in (server, other):
        each.step(ONES)
        assert each.theta.tolist() == [1 + 1.5] * 3


def test_devices_are_asked_uniformly_and_by_the_round():
    assert draw_asked(5, None, DRAWS).tolist() == [0, 1, 2, 3, 4]
    counts = torch.zeros(10)
    for t in range(2000):
        asked = draw_asked(10, 3, DRAWS.at(t))
        assert len(asked.unique()) == 3
        counts[asked] += 1
    assert (counts - 600).abs().max() < 4.9 * (2000 * 0.3 * 0.7) ** 0.5


def test_devices_are_late_with_the_stated_probability_whoever_else_is_asked():
    devices = torch.arange(3000)
    missed = draw_late(devices, 0.25, DRAWS)
    assert abs(float(missed.float().mean()) - 0.25) < 4.9 * (0.25 * 0.75 / 3000) ** 0.5
    assert torch.equal(draw_late(devices[7:9], 0.25, DRAWS), missed[7:9])
    assert not draw_late(devices, 0.0, DRAWS).any()


@pytest.mark.parametrize(("arguments", "name"), [({"lr": 0.0}, "lr"), ({"momentum": 1.0}, "momentum")])
def test_a_step_that_cannot_be_is_refused(arguments, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Server(ONES, **arguments)

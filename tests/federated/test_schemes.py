"""Schemes by name, and the one that docs/federated.md adds, as it is written there."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from federated import schemes
from federated.channel import Channel, MultipleAccess
from federated.checkpoint import described
from federated.downlink import AnalogDownlink
from federated.draws import Draws
from federated.simulate import Simulation
from federated.uplink import QuantizedUplink, Uplink
from tests.federated.small import small_data, small_parts, training

REPOSITORY = Path(__file__).resolve().parents[2]
DATA, PARTS, TEST = small_data(), small_parts(), small_data(40, seed=1)
MAC = MultipleAccess.from_snr(20.0, subchannels=8)
KNOWN = {"channel": MAC, "size": 260, "threshold": 0.1, "sketch": {"chunk_size": 65, "sketch_size": 50}}


def loaded(name, path, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "recipes"))
    return lambda path: loaded(Path(path).stem, REPOSITORY / "recipes" / path, monkeypatch)


def blocks():
    """Return the two blocks of code below the page's heading: the scheme, and its registration."""
    page = (REPOSITORY / "docs" / "federated.md").read_text()
    section = page[page.index("## Add a scheme") :].split("\n## ", 1)[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def tables(monkeypatch):
    """What is registered is forgotten after the test."""
    for table in ("DOWNLINKS", "UPLINKS", "SCHEMES"):
        monkeypatch.setattr(schemes, table, dict(getattr(schemes, table)))


@pytest.fixture
def majority(tables, tmp_path, monkeypatch):
    """The page's scheme, registered as the page says."""
    code, line = blocks()
    (tmp_path / "majority.py").write_text(code)
    module = loaded("federated.majority", tmp_path / "majority.py", monkeypatch)
    exec(compile(line, "docs/federated.md", "exec"), vars(schemes))
    return module


def test_a_scheme_is_one_file_of_at_most_60_lines_and_one_line():
    code, line = blocks()
    assert len(code.splitlines()) <= 60
    assert len(line.splitlines()) == 1
    assert "majority" not in schemes.SCHEMES


def test_what_the_page_adds_is_a_vote(majority):
    """Without noise and with every channel strong enough: the sign of the sum of signs, whatever the blocks."""
    uplink = majority.MajorityUplink(MultipleAccess.from_snr(math.inf, subchannels=8), threshold=0.0, step=0.5)
    update = torch.randn(7, 101, generator=torch.Generator().manual_seed(0))
    for block in (7, 2):
        here = uplink.open(101, 7, None, Draws((0, "up")))
        for devices in torch.arange(7).split(block):
            assert here.send(devices, update[devices], torch.ones(len(devices))).all()
        assert torch.equal(here.receive(), 0.5 * update.sign().sum(0).sign())
        assert here.traffic.bits == 7 * 101
        assert here.traffic.channel_uses == math.ceil(51 / 8) * 8
    silent = majority.MajorityUplink(MAC, threshold=99.0).open(101, 7, None, Draws((0, "up")))
    silent.send(torch.arange(7), update, torch.ones(7))
    assert silent.receive() is None


def test_what_the_page_adds_trains_and_is_resumed_with_its_own_settings_only(majority, tmp_path):
    def make(**settings):
        uplink = schemes.make_uplink("majority", settings, **KNOWN)
        assert isinstance(uplink, majority.MajorityUplink)
        assert uplink.threshold == 0.1
        return Simulation(training(), DATA, PARTS, test=TEST, uplink=uplink, output_dir=tmp_path, checkpoint_every=5)

    sim = make(step=0.02)
    rows = list(sim.run(10, progress=False))
    assert rows[-1]["accuracy"] > 0.8  # chance is 0.25
    assert rows[-1]["bits_up"] == 5 * 260
    assert make(step=0.02).resume() == 10
    with pytest.raises(ValueError, match=r"uplink was MajorityUplink\(.*step=0.02\), now .*step=0.03\)"):
        make(step=0.03).resume()


def test_what_the_page_adds_is_a_choice_of_every_command_line(majority, recipe, tmp_path, capsys):
    mnist, finetune = recipe("federated_mnist.py"), recipe("federated_finetune.py")
    few = ["--devices", "10", "--rounds", "12", "--evaluate_every", "12", "--output_dir", str(tmp_path / "run")]
    run = [*few, "--scheme", "majority", "--settings", "step=0.05"]
    assert mnist.main(run) == 0
    assert mnist.main([*run[:-1], "step=0.06", "--resume"]) == 2
    assert "now MajorityUplink(" in capsys.readouterr().err
    assert mnist.main([*run[:-1], "pace=0.06", "--overwrite"]) == 2
    assert "settings of 'majority' must be channel or threshold or step, got 'pace'" in capsys.readouterr().err
    args = finetune.parse(["--uplink", "majority", "--settings", "step=0.001"])
    assert isinstance(finetune.open_uplink(args, 1000), majority.MajorityUplink)


def test_what_the_page_adds_runs_on_flower(majority, recipe, monkeypatch):
    pytest.importorskip("flwr.app", reason="Flower needs Python 3.11")
    from flwr.supercore.task_identity import TaskIdentity

    from federated.downlink import IdealDownlink
    from tests.federated.test_flower import on_flower

    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    app = recipe("federated_flower/radio_app.py")
    config = {"scheme": "majority", "settings": "step=0.05", "snr-db": 20.0, "devices": 5}
    _, uplink = app.links({**config, "steps": 2, "batch-size": 8, "lr": 0.1})
    assert isinstance(uplink, majority.MajorityUplink)
    theta, rows, _ = on_flower(IdealDownlink(), uplink, rounds=3)
    sim = Simulation(training(), DATA, PARTS, uplink=uplink)
    simulated = list(sim.run(3, progress=False))
    assert [row["bits_up"] for row in rows] == [row["bits_up"] for row in simulated]
    assert int(((theta - sim.theta).abs() > 1e-6).sum()) <= 8  # a vote may be turned by the order of sums


# ------------------------------------------------------------------------------------------ the tables


@pytest.mark.parametrize("name", schemes.SCHEMES)
def test_every_scheme_names_links_that_can_be_made(name):
    down, up = schemes.SCHEMES[name]
    channel = Channel.from_snr(20.0, ofdm_symbols=40)
    schemes.make_downlink(down, channel=channel, participants=3)
    assert isinstance(schemes.make_uplink(up, **KNOWN), Uplink)


def test_a_downlink_is_registered_with_an_uplink_that_is_there(tables):
    schemes.register("mine", downlink=AnalogDownlink, uplink="analog")
    assert schemes.SCHEMES["mine"] == ("mine", "analog")
    assert isinstance(schemes.make_downlink("mine", channel=MAC, participants=3), AnalogDownlink)
    assert "mine" not in schemes.UPLINKS


def test_sketches_cross_any_uplink_by_name_and_fit_its_budget():
    budget = MultipleAccess.from_snr(20.0, subchannels=8, ofdm_symbols=10)
    uplink = schemes.make_uplink("sketched", {"over": "blind"}, **KNOWN | {"channel": budget, "antennas": 3})
    assert uplink.codec.sketch_size == 160 // 4
    assert uplink.over.channel.antennas == 3


def test_settings_count_more_than_what_is_known():
    assert schemes.make_uplink("quantized", {"levels": 9}, levels=5, channel=MAC).levels == 9
    assert schemes.read_settings(["levels=9", "over=blind", "rate=-1e-3"]) == {
        "levels": 9, "over": "blind", "rate": -1e-3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: schemes.register("blind"), "name must be that of no scheme or link yet, got 'blind'"),
        (lambda: schemes.make_uplink("blond", **KNOWN), "uplink must be one of ideal, quantized, .*, got 'blond'"),
        (lambda: schemes.make_uplink("ideal", {"step": 1}, **KNOWN), "settings of 'ideal' must be none, got 'step'"),
        (lambda: schemes.make_uplink("quantized", {"levels": 0}), "levels must be at least 1, got 0"),
        (lambda: schemes.read_settings(["step"]), "settings must be written NAME=VALUE, got 'step'"),
    ],
)
def test_what_cannot_be_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_every_setting_of_a_link_is_in_its_description():
    """Tuples too, and channels; what a link remembers is not."""

    class Odd(QuantizedUplink):
        def __init__(self, rates, channel):
            super().__init__(levels=3)
            self.rates, self.channel, self.held = rates, channel, torch.ones(2)

    assert described(Odd((1, 2), MAC)) == f"Odd(levels=3, channel={MAC!r}, rates=(1, 2))"

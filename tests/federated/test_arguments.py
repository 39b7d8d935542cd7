"""Every number that federations and markets take, in every way that it can be wrong, is refused by name.

What takes numbers is read from signatures and parsers, so the next argument is tried as well.
"""

import importlib
import inspect
import math
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from federated import partition
from federated.channel import Channel, MultipleAccess
from federated.checkpoint import describe
from federated.device import LocalTraining
from federated.downlink import AnalogDownlink, DigitalDownlink, SelectionDownlink
from federated.market import cli
from federated.market.features import ArrayFeatures, PixelFeatures
from federated.market.privacy import Ledger, private_answer
from federated.market.query import Encoder, make_query
from federated.market.rank import portfolio, rank
from federated.market.score import score
from federated.models import make_model
from federated.server import Server
from federated.simulate import Simulation
from federated.uplink import AnalogUplink, BlindUplink, IdealUplink, QuantizedUplink, SketchedUplink
from tests.federated.small import SGD, small_data, small_model, small_parts, training

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
RECIPES = {name: importlib.import_module(name) for name in ("federated_mnist", "federated_finetune", "data_market")}
sys.path.pop(0)

ROWS = torch.randn(60, 12, generator=torch.Generator().manual_seed(0))
ENCODER = Encoder("rows", "0" * 64, "none", False, 12)
QUERY, KEY = make_query(ROWS, ENCODER, directions=3, decoys=2, seed=0)
LABELS = Dataset.from_dict({"labels": [i % 4 for i in range(40)]})
BUYER, SELLERS = KEY.buyer(), {"a": KEY.buyer()}

TAKERS = {
    "Channel": (Channel, {}),
    "Channel.from_snr": (Channel.from_snr, {"snr_db": 3.0}),
    "MultipleAccess": (MultipleAccess, {}),
    "SelectionDownlink": (SelectionDownlink, {"channel": Channel(ofdm_symbols=9), "participants": 2}),
    "QuantizedUplink": (QuantizedUplink, {"levels": 3}),
    "AnalogUplink": (AnalogUplink, {"channel": MultipleAccess()}),
    "SketchedUplink": (SketchedUplink, {"over": IdealUplink()}),
    "Server": (Server, {"theta": torch.zeros(3)}),
    "LocalTraining": (LocalTraining, {"model": small_model(), "optimizer": SGD}),
    "Simulation": (Simulation, {"training": training(), "data": small_data(), "parts": small_parts()}),
    "make_model": (make_model, {"name": "softmax", "image_size": 8, "num_channels": 1, "num_labels": 4}),
    "iid": (partition.iid, {"dataset": LABELS, "num_devices": 4}),
    "biased": (partition.biased, {"dataset": LABELS, "num_devices": 4}),
    "dirichlet": (partition.dirichlet, {"dataset": LABELS, "num_devices": 4, "alpha": 9.0}),
    "make_query": (make_query, {"x": ROWS, "encoder": ENCODER, "directions": 3, "decoys": 2}),
    "private_answer": (
        private_answer,
        {"query": QUERY, "batches": [ROWS], "encoder": ENCODER, "seller": "s", "epsilon": 1.0, "delta": 1e-6},
    ),
    "Ledger": (Ledger, {"path": "ledger.json", "epsilon": 1.0, "delta": 1e-6}),
    "rank": (rank, {"buyer": BUYER, "sellers": SELLERS}),
    "portfolio": (portfolio, {"buyer": BUYER, "sellers": SELLERS, "budget": 1.0}),
    "score": (score, {"buyer": BUYER, "seller": BUYER}),
    "PixelFeatures": (PixelFeatures, {}),
    "ArrayFeatures": (ArrayFeatures, {"dimension": 3}),
}
NO_NUMBERS = (True, "3", [1], 1j, math.nan)
UNBOUNDED = {"snr_db": (math.inf,)}  # what stands for something


def numbers(taker):
    """Return the arguments that are numbers: name → whether whole, and whether it may be None."""
    found = {}
    for name, parameter in inspect.signature(taker).parameters.items():
        kinds = set(str(parameter.annotation).replace(" ", "").split("|"))
        if kinds & {"int", "float"}:
            found[name] = ("int" in kinds, "None" in kinds)
    return found


LINKS = {
    "SelectionDownlink": ("channel",),
    "QuantizedUplink of a channel": ("channel",),
    "AnalogUplink": ("channel",),
    "BlindUplink": ("channel",),
    "SketchedUplink": ("over",),
    "DigitalDownlink": ("channel",),
    "AnalogDownlink": ("channel",),
    "LocalTraining": ("model", "optimizer", "batched"),
    "Simulation": ("training", "downlink", "uplink"),
    "RadioStrategy": ("downlink", "uplink"),
}


@pytest.mark.parametrize(("taker", "name"), [(taker, name) for taker, names in LINKS.items() for name in names])
def test_what_is_of_another_class_is_refused_by_name(taker, name):
    held = takers() | {
        "QuantizedUplink of a channel": (QuantizedUplink, {}),
        "BlindUplink": (BlindUplink, {}),
        "DigitalDownlink": (DigitalDownlink, {}),
        "AnalogDownlink": (AnalogDownlink, {}),
    }
    if taker not in held:
        pytest.skip("needs Flower")
    make, arguments = held[taker]
    for value in ("ideal", 3, [1]):
        with pytest.raises(TypeError, match=f"{name} must .*, got {re.escape(repr(value))}"):
            make(**{**arguments, name: value})
    if taker in ("AnalogUplink", "BlindUplink"):  # one channel is not another
        with pytest.raises(TypeError, match="channel must be a MultipleAccess, got Channel"):
            make(Channel())


def takers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Flower imports
        try:
            from federated.flower import RadioStrategy
        except ImportError:  # Python 3.10 has no Flower
            return TAKERS
    return TAKERS | {"RadioStrategy": (RadioStrategy, {"num_devices": 4})}


@pytest.mark.parametrize(
    ("taker", "name"), [(taker, name) for taker, (make, _) in takers().items() for name in numbers(make)]
)
def test_what_is_no_such_number_is_refused_by_name(taker, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, arguments = takers()[taker]
    whole, optional = numbers(make)[name]
    values = [*NO_NUMBERS, -(10**9), *(() if optional else (None,)), *((2.5, 2.0, math.inf) if whole else (-math.inf,))]
    values += [] if whole else [math.inf]
    make(**arguments)
    for value in values:
        if any(value is allowed for allowed in UNBOUNDED.get(name, ())):
            continue
        with pytest.raises((TypeError, ValueError)) as caught:
            make(**{**arguments, name: value})
        said = str(caught.value)
        assert name in said, f"{value!r}: {said}"
        assert repr(value) in said, f"{value!r}: {said}"
        assert "must" in said


@pytest.mark.parametrize("value", [np.int64(3), torch.tensor(3), 3])
def test_numbers_of_numpy_and_torch_are_numbers(value):
    assert Channel(subchannels=value, ofdm_symbols=value) == Channel(subchannels=3, ofdm_symbols=3)
    sim = Simulation(training(steps=value), small_data(), small_parts(), asked=value, seed=value, evaluate_every=value)
    assert describe(sim.world) == describe(
        Simulation(training(steps=3), small_data(), small_parts(), asked=3, seed=3).world
    )


def options():
    """Return every number of every command: its function, the words before, and the option."""
    chosen = cli._parser()._subparsers._group_actions[0].choices
    commands = {name: (cli.main, [name], parser) for name, parser in chosen.items()}
    commands |= {name: (module.main, [], module.make_parser()) for name, module in RECIPES.items()}
    found = {}
    for name, (run, words, parser) in commands.items():
        required = [
            text for action in parser._actions if action.required
            for text in (*action.option_strings[:1], "nothing")
        ]  # fmt: skip
        for action in parser._actions:
            if action.type in (int, float):
                found[f"{name} {action.option_strings[-1]}"] = (run, [*words, *required], action)
    return found


@pytest.mark.parametrize("option", options())
def test_an_option_that_is_no_sensible_number_is_refused_before_any_work(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, words, action = options()[option]
    for value in ("-1",) if action.type is int else ("nan", "-inf", "-1000"):
        assert run([*words, f"{action.option_strings[-1]}={value}"]) == 2, value
        said = capsys.readouterr()
        assert said.err.count("\n") == 1
        assert action.dest in said.err
        assert f"got {float(value) if action.type is float else value}" in said.err
        assert said.out == ""
    assert not list(tmp_path.iterdir())

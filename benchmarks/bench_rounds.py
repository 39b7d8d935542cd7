"""Rounds per second: the simulator against a plain loop over devices and Flower's simulation of the same FedAvg round.

python benchmarks/bench_rounds.py --data path/to/mnist                 # softmax and CNN, 40 devices

One run on one machine. Everything before the first timed round is left out: Flower's start-up and its first two rounds,
two rounds of each of ours. The loop and the simulator are timed in turns before and after Flower; each row has every
round's seconds. Flower runs its own FedAvg with a client that trains as the plain loop does, one core to a client, on
all cores. The loop has one thread. The simulator has one for the softmax model, and all cores for the CNN.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "recipes"))

import torch

import federated_data
from benchmarks import harness
from benchmarks.tasks import SHARED
from federated import partition
from federated.device import Batches, Flat, LocalTraining, draw_batches, updates_in_a_loop
from federated.draws import Draws
from federated.models import make_model
from federated.simulate import Simulation

RESULTS = "federated_rounds"
DEVICES, WARM_UP = 40, 2
THREADS = {"softmax": 1, "cnn": os.cpu_count() or 1}
ROUNDS = {"softmax": {"steps": 3, "batch_size": 64}, "cnn": {"steps": 1, "batch_size": 32}}
SETTINGS = "BENCH_ROUNDS"  # environment variable: folder and model, for Flower's processes


class PlainLoop(LocalTraining):
    """One device after the other."""

    def updates(self, theta_hat: torch.Tensor, batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
        return updates_in_a_loop(self, theta_hat, batches)


def training(model: str, kind: type[LocalTraining] = LocalTraining) -> LocalTraining:
    """Return how every device trains."""
    return kind(
        model=make_model(model, image_size=28, num_channels=1, num_labels=10),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        **ROUNDS[model],
    )


@functools.cache
def data_and_parts(folder: str) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Open MNIST and deal it out, once a process."""
    data = federated_data.idx_folder(Path(folder))
    parts = [torch.from_numpy(part) for part in partition.iid(data.train, DEVICES)]
    return data.columns_of(test=False), parts


def simulate(folder: str, model: str, kind: type[LocalTraining], rounds: int) -> list[float]:
    """Time rounds of the simulator, or of the plain loop."""
    torch.set_num_threads(1 if kind is PlainLoop else THREADS[model])
    data, parts = data_and_parts(folder)
    sim = Simulation(training(model, kind), data, parts)
    return [sim.step()["seconds"] for _ in range(WARM_UP + rounds)][WARM_UP:]


# ------------------------------------------------------------------------------------------ Flower


@functools.cache
def own_training(model: str) -> LocalTraining:
    """Make the model once a process."""
    torch.set_num_threads(1)
    return training(model, PlainLoop)


def train_on_flower(message: Any, context: Any) -> Any:
    """Train as a plain Flower client does."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    settings = json.loads(os.environ[SETTINGS])
    train, (data, parts) = own_training(settings["model"]), data_and_parts(settings["folder"])
    device = int(context.node_config["partition-id"])
    train.model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    theta = Flat.of(train.model).read(train.model)
    draws = Draws((0,)).at("round", int(message.content["config"]["server-round"]))
    batches = draw_batches(data, [parts[device]], train.steps, train.batch_size, [device], draws)
    update, loss = updates_in_a_loop(train, theta[None], batches)
    train.flat.write(theta + update[0], train.model)
    metrics = MetricRecord({"num-examples": len(parts[device]), "loss": float(loss[0])})
    return Message(RecordDict({"arrays": ArrayRecord(train.model.state_dict()), "metrics": metrics}), reply_to=message)


def flower(folder: str, model: str, rounds: int) -> list[float]:
    """Time rounds of Flower's FedAvg on Ray, one core a client."""
    from flwr.app import ArrayRecord, Context
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    os.environ[SETTINGS] = json.dumps({"folder": folder, "model": model})
    ends: list[float] = []

    class Timed(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            found = super().aggregate_train(server_round, replies)
            ends.append(time.perf_counter())
            return found

    server, client = ServerApp(), ClientApp()
    from benchmarks import bench_rounds  # by its name, so that Ray's processes import it and keep what it holds

    client.train()(bench_rounds.train_on_flower)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Timed(fraction_evaluate=0.0, min_train_nodes=DEVICES, min_available_nodes=DEVICES)
        start = ArrayRecord(training(model).model.state_dict())
        strategy.start(grid, start, num_rounds=WARM_UP + rounds)

    run_simulation(server, client, DEVICES, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    return [after - before for before, after in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=SHARED / "mnist", help="a folder with MNIST's idx files")
    parser.add_argument("--model", choices=ROUNDS, action="append")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds of Flower")
    args = parser.parse_args()
    folder = str(Path(args.data).resolve())
    for model in args.model or list(ROUNDS):
        seconds: dict[str, list[float]] = {"simulator": [], "loop": []}
        for turn in range(4):
            if turn == 2:
                seconds["flower"] = flower(folder, model, args.rounds)
            for name, kind in (("simulator", LocalTraining), ("loop", PlainLoop)):
                seconds[name] += simulate(folder, model, kind, args.rounds)
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        row = {
            "model": model,
            "devices": DEVICES,
            "simulator_threads": THREADS[model],
            **ROUNDS[model],
            "rounds_per_second": {name: round(1 / each, 3) for name, each in medians.items()},
            "over_flower": round(medians["flower"] / medians["simulator"], 2),
            "over_loop": round(medians["loop"] / medians["simulator"], 2),
            "engine": {name: version(name) for name in ("flwr", "ray")},
            "load": os.getloadavg(),
            "seconds": {name: [round(each, 4) for each in every] for name, every in seconds.items()},
        }
        harness.add_row(RESULTS, row)
        print(json.dumps({name: value for name, value in row.items() if name != "seconds"}), flush=True)


if __name__ == "__main__":
    main()

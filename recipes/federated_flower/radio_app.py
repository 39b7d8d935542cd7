"""ServerApp and ClientApp of the wireless systems on scikit-learn's digits; see docs/federated.md.

    flwr run recipes/federated_flower                                               # simulation on Ray
    flwr run recipes/federated_flower --run-config 'scheme="sketched" rounds=20'
    flwr run recipes/federated_flower my-superlink                                  # SuperLink and SuperNodes

`federated` and `sgc` must be importable on every machine. A SuperNode is told which device it is by
`--node-config "partition-id=0"`.
"""

from __future__ import annotations

import functools
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from sklearn.datasets import load_digits

from federated import partition
from federated.channel import Channel, MultipleAccess
from federated.device import Batch, LocalTraining
from federated.downlink import Downlink
from federated.files import check_folder
from federated.flower import Device, RadioStrategy, arrays, client_app, tensor_of
from federated.metrics import evaluate
from federated.models import make_model
from federated.schemes import SCHEMES, make_downlink, make_uplink, read_settings
from federated.uplink import Uplink


@functools.cache
def digits() -> tuple[Batch, Batch]:
    """Open the embedded digits: rows to train on, and every fifth to test."""
    raw = load_digits()
    pictures = torch.from_numpy(raw.images[:, None].astype(np.float32) / 16)
    labels, test = torch.from_numpy(raw.target).long(), torch.arange(len(raw.target)) % 5 == 0
    train, held_out = ({"pixel_values": pictures[of], "labels": labels[of]} for of in (~test, test))
    return train, held_out


def links(config: Any) -> tuple[Downlink, Uplink]:
    """Make the links of the scheme that a run asks for."""
    scheme, snr_db = str(config["scheme"]), float(config["snr-db"])
    if scheme not in SCHEMES:
        *names, last = SCHEMES
        raise ValueError(f"scheme must be {', '.join(names)} or {last}, got {scheme!r}")
    down, up = SCHEMES[scheme]
    budget = 200 if down in ("digital", "selection") else None
    downlink = make_downlink(
        down,
        channel=Channel.from_snr(snr_db, subchannels=16, ofdm_symbols=budget),
        participants=max(1, int(config["devices"]) // 2),
    )
    uplink = make_uplink(
        up,
        read_settings(str(config["settings"]).split()),
        channel=MultipleAccess.from_snr(snr_db, subchannels=16),
        size=training(config).flat.size,
        threshold=0.2,
        sketch={"chunk_size": 256, "sketch_size": 128, "sparsity": 32},
    )
    return downlink, uplink


def training(config: Any) -> LocalTraining:
    """Make the model and how it trains."""
    return LocalTraining(
        model=make_model("softmax", image_size=8, num_channels=1, num_labels=10),
        steps=int(config["steps"]),
        batch_size=int(config["batch-size"]),
        optimizer=partial(torch.optim.SGD, lr=float(config["lr"])),
    )


def open_device(context: Context) -> Device:
    """Make the device that a node is, with its rows of the split."""
    config, number = context.run_config, int(context.node_config["partition-id"])
    train, _ = digits()
    rows = Dataset.from_dict({"labels": train["labels"].numpy()})
    part = torch.from_numpy(partition.iid(rows, int(config["devices"]), seed=int(config["seed"]))[number])
    return Device(number, training(config), {name: column[part] for name, column in train.items()})


def open_uplink(context: Context) -> Uplink:
    """Make the uplink of the scheme that the run asks for."""
    return links(context.run_config)[1]


client = client_app(open_device, open_uplink)
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds, and write what they gave."""
    config = context.run_config
    if config["output"]:
        check_folder(Path(str(config["output"])), "output")
    devices, lines = int(config["devices"]), []
    downlink, uplink = links(config)
    train, (_, test) = training(config), digits()

    def judge(number: int, record: ArrayRecord) -> MetricRecord:
        train.flat.write(tensor_of(record, "theta"), train.model)
        return MetricRecord(evaluate(train.model, test))

    strategy = RadioStrategy(
        devices,
        downlink=downlink,
        uplink=uplink,
        seed=int(config["seed"]),
        on_round=lambda number, metrics: lines.append({"round": number, **metrics, "left_out": strategy.left_out}),
    )
    start = arrays(theta=train.flat.read(train.model))
    result = strategy.start(grid, start, num_rounds=int(config["rounds"]), evaluate_fn=judge)
    for line in lines:
        line |= dict(result.evaluate_metrics_serverapp[line["round"]])
    if config["output"]:
        out = Path(str(config["output"]))
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / f".rows-{os.getpid()}"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        train.flat.write(tensor_of(result.arrays, "theta"), train.model)
        train.model.save_pretrained(out / "model")
        temporary.replace(out / "rows.jsonl")

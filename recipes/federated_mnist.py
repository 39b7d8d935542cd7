"""Federated learning over a simulated radio, on images or text.

    python recipes/federated_mnist.py                                     # all on its own: scikit-learn's digits
    python recipes/federated_mnist.py --scheme blind --antennas 80        # one of the wireless systems
    python recipes/federated_mnist.py --scheme noisy-downlink --downlink digital --split biased
    python recipes/federated_mnist.py --dataset mnist                     # from the hub
    python recipes/federated_mnist.py --dataset path/to/mnist             # a folder with the original idx files
    python recipes/federated_mnist.py --dataset cifar10 --model vit       # any set of images of one size on the hub
    python recipes/federated_mnist.py --dataset imdb --model_name_or_path MODEL   # any set of texts, any classifier
    python recipes/federated_mnist.py --resume                            # after kill -9; bit-equal
    python recipes/federated_mnist.py --sweep selection                   # a figure of the papers

| --scheme | downlink | uplink | paper |
|---|---|---|---|
| ideal | ideal | ideal | FedAvg |
| downlink-selection | digital, to the --participants devices with the best channels | ideal | arXiv 2107.03510 |
| noisy-downlink | analog broadcast (--downlink digital: the common rate) | truncated inversion | arXiv 2008.11141 |
| blind | ideal | no CSI at the devices, --antennas at the server | arXiv 2010.10030 |
| sketched | ideal | the codec's sketches by truncated inversion | ours, after arXiv 1901.00844, 1907.09769 |

Any --downlink goes with any --uplink. Without arguments: accuracy 0.92 after 40 rounds, in a few seconds. The folder
`--output_dir` gets rows.jsonl (a row a round), curve.png, devices.png (who holds what), the model and a checkpoint.
The sweeps and what they show are in docs/federated.md.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import federated_runs
from federated import partition
from federated.arguments import check_options
from federated.channel import FADING, Channel, MultipleAccess, check_snr
from federated.device import LocalTraining
from federated.downlink import Downlink
from federated.files import opening, rows_of
from federated.models import make_model
from federated.schemes import DOWNLINKS, SCHEMES, UPLINKS, make_downlink, make_uplink, read_settings
from federated.simulate import Simulation
from federated.uplink import Uplink
from federated_data import Data, hub_data, open_data

__all__ = ["hub_data"]  # of federated_data, for scripts that know it from here
MODELS = ("softmax", "cnn", "vit")

# ------------------------------------------------------------------------------------------ model and links


def open_model(args: argparse.Namespace, data: Data) -> PreTrainedModel:
    """Make a built-in model, or open one of the hub or a folder."""
    if args.model_name_or_path is None:
        if data.image is None:
            raise ValueError("texts need --model_name_or_path")
        channels, side = data.image
        return make_model(args.model, image_size=side, num_channels=channels, num_labels=data.classes, seed=args.seed)
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, set_seed

    set_seed(args.seed)
    auto = AutoModelForSequenceClassification if data.image is None else AutoModelForImageClassification
    arguments: dict[str, Any] = {"num_labels": data.classes, "ignore_mismatched_sizes": True, "dtype": torch.float32}
    # the fused attention has no batched form over devices; written out, it has
    arguments |= {"attn_implementation": "eager", "trust_remote_code": args.trust_remote_code}
    with opening("the model", args.model_name_or_path):
        return auto.from_pretrained(args.model_name_or_path, **arguments)


def open_optimizer(args: argparse.Namespace) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    """Return what makes the optimizer of the local steps."""
    if args.optimizer == "sgc":
        from sgc import SGC

        return partial(SGC, lr=args.lr, chunk_size=256, sketch_size=64, sparsity=8)
    return partial({"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[args.optimizer], lr=args.lr)


def link_names(args: argparse.Namespace) -> tuple[str, str]:
    """Return the names of the downlink and the uplink: the scheme's, or others where they are given."""
    down, up = SCHEMES[args.scheme]
    return args.downlink or down, args.uplink or up


def open_downlink(args: argparse.Namespace, devices: int) -> Downlink:
    """Make the downlink, for M = devices."""
    name, known = link_names(args)[0], {"participants": args.participants or max(1, devices // 4)}
    if name != "ideal":
        arguments = {"power": args.power_down, "subchannels": args.subchannels, "fading": args.fading}
        reference = Channel.from_snr(args.snr_db, **(arguments | {"power": 1.0}))  # SNR is stated at power 1
        noise = reference.noise_variance
        known["channel"] = Channel(noise_variance=noise, ofdm_symbols=args.ofdm_symbols, **arguments)
    return make_downlink(name, **known)


def open_uplink(args: argparse.Namespace, size: int) -> Uplink:
    """Make the uplink, for d = size."""
    channel = MultipleAccess.from_snr(
        args.snr_db if args.snr_up_db is None else args.snr_up_db,
        subchannels=args.subchannels,
        fading=args.fading,
        csi_error_variance=args.csi_error,
        ofdm_symbols=args.ofdm_symbols_up,
    )
    sketch = {name: getattr(args, name) for name in ("chunk_size", "sketch_size", "sparsity", "recovered", "residual")}
    known = {name: getattr(args, name) for name in ("antennas", "threshold", "levels")}
    known |= {"channel": channel, "size": size, "sketch": sketch | {"method": "gomp"}}
    return make_uplink(link_names(args)[1], read_settings(args.settings), **known)


def split(args: argparse.Namespace, rows: Dataset) -> list[np.ndarray]:
    """Deal the training rows out to the devices."""
    if args.split == "iid":
        return partition.iid(rows, args.devices, seed=args.seed)
    if args.split == "biased":
        return partition.biased(rows, args.devices, seed=args.seed)
    if args.split == "dirichlet":
        return partition.dirichlet(rows, args.devices, args.alpha, seed=args.seed)
    return partition.by_column(rows, args.split)


def simulation(args: argparse.Namespace, data: Data, output_dir: Path | None) -> Simulation:
    """Make the simulation of a run."""
    parts = split(args, data.train)
    if args.participants is not None and args.participants > len(parts):
        raise ValueError(f"participants must be at most the {len(parts)} devices, got {args.participants}")
    model = open_model(args, data)
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    selects = link_names(args)[0] == "selection"
    return Simulation(
        LocalTraining(
            model=model, steps=args.steps, batch_size=args.batch_size or None, optimizer=open_optimizer(args)
        ),
        data.columns_of(test=False),
        parts,
        test=data.columns_of(test=True),
        downlink=open_downlink(args, len(parts)),
        uplink=open_uplink(args, size),
        server_lr=args.server_lr,
        server_momentum=args.server_momentum,
        asked=None if selects else args.participants,
        late=args.late,
        seed=args.seed,
        devices_at_once=args.devices_at_once,
        evaluate_every=args.evaluate_every,
        most_skipped=args.most_skipped,
        output_dir=output_dir,
        checkpoint_every=args.checkpoint_every if output_dir else 0,
    )


# ------------------------------------------------------------------------------------------ the run and its curve


def plot_curve(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Draw accuracy and loss on the test data over the rounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    measured = [row for row in rows if "accuracy" in row]
    rounds = [row["round"] for row in measured]
    axes.plot(rounds, [row["accuracy"] for row in measured], color="#0b6e4f")
    axes.set(xlabel="round", ylabel="test accuracy", title=title, ylim=(0, 1))
    loss = axes.twinx()
    loss.plot(rounds, [row["loss"] for row in measured], color="#c1440e", alpha=0.6)
    loss.set_ylabel("test loss (nats)")
    axes.grid(alpha=0.25)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, path)


def curve_line(row: dict[str, Any]) -> str:
    """Return a row of the curve as a line of text."""
    if row["skipped"]:
        return f"{row['round']:6d}  skipped: {row['skipped']}"
    cells = [f"{row['round']:6d}", f"{row['accuracy']:9.4f}", f"{row['loss']:8.4f}", f"{row['participants']:8d}"]
    cells += [f"{'–':>10}" if row[name] is None else f"{row[name]:10.2e}" for name in ("nmse_down", "nmse_up")]
    cells.append(f"{row['seconds']:8.2f}")
    if row["dropped"]:
        cells.append(f"  {row['dropped']} dropped: not finite")
    return " ".join(cells)


def run(args: argparse.Namespace) -> int:
    """Train, with everything written to the output folder; return the exit status."""
    out = federated_runs.folder_of(args)
    data = open_data(args)
    sim = simulation(args, data, out)
    federated_runs.resume(sim, args)
    out.mkdir(parents=True, exist_ok=True)
    parts = [part.numpy() for part in sim.world.parts]
    partition.plot_partition(parts, np.asarray(data.train["labels"]), out / "devices.png", title=args.split)
    tqdm.write(f"{len(parts)} devices, {len(data.train):,} rows, {sim.world.training.flat.size:,} parameters")
    tqdm.write(" round  accuracy     loss  devices  NMSE down    NMSE up  seconds")
    for row in federated_runs.rounds(sim, args.rounds):
        if "accuracy" in row or row["skipped"]:
            tqdm.write(curve_line({"accuracy": 0.0, "loss": 0.0} | row))
    rows = rows_of(out / "rows.jsonl", {"round": int}) if (out / "rows.jsonl").exists() else []
    down, up = link_names(args)
    plot_curve(out / "curve.png", rows, f"{args.scheme}: {down} down, {up} up, {args.split} split")
    return federated_runs.finish(sim, out, args.rounds, "curve.png", "devices.png")


LOWEST = {"batch_size": 0, "checkpoint_every": 0, "seed": 0, "snr_db": -math.inf, "snr_up_db": -math.inf}


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scheme", choices=SCHEMES, default="ideal")
    add("--downlink", choices=DOWNLINKS, help="another than the scheme's")
    add("--uplink", choices=UPLINKS, help="another than the scheme's")
    add("--dataset", default="digits", help="digits, mnist, a file, a folder, or a name on the hub")
    add("--dataset_config", help="of a data set on the hub that has several")
    add("--label_column", help="of a data set on the hub")
    add("--model", choices=MODELS, default="softmax", help="a built-in model of images")
    add("--model_name_or_path", help="a Hugging Face model instead")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    add("--split", default="iid", help="iid, biased (two classes a device), dirichlet, or a column's name")
    add("--alpha", type=float, default=0.5, help="of --split dirichlet")
    add("--devices", type=int, default=40, help="M")
    add("--participants", type=int, help="J: devices selected (default M/4) or asked (default all) in a round")
    add("--late", type=float, default=0.0, help="probability that a device misses a round")
    add("--rounds", type=int, default=40)
    add("--steps", type=int, default=3, help="τ, local steps")
    add("--batch_size", type=int, default=64, help="of a local step; 0: all of a device's rows")
    add("--optimizer", choices=("sgd", "adamw", "sgc"), default="sgd", help="of the local steps")
    add("--lr", type=float, help="η; default 0.5 on the digits, else 0.1")
    add("--server_lr", type=float, default=1.0)
    add("--server_momentum", type=float, default=0.0)
    add("--snr_db", type=float, default=10.0, help="mean SNR of a subchannel at power 1")
    add("--snr_up_db", type=float, help="of the uplink; default --snr_db")
    add("--power_down", type=float, default=1.0, help="P of the server; the noise is that of --snr_db at 1")
    add("--subchannels", type=int, default=16, help="F")
    add("--ofdm_symbols", type=int, help="T of the downlink; a digital one needs it")
    add("--ofdm_symbols_up", type=int, help="T of the uplink; sketches are made to fit")
    add("--fading", choices=FADING, default="block")
    add("--antennas", type=int, default=40, help="N_r of the blind uplink")
    add("--csi_error", type=float, default=0.0, help="σ̃² of the blind uplink")
    add("--threshold", type=float, default=0.2, help="λ of truncated inversion")
    add("--levels", type=int, default=3, help="q of the quantized uplink")
    add("--chunk_size", type=int, default=256, help="n of the sketched uplink")
    add("--sketch_size", type=int, default=128, help="k")
    add("--sparsity", type=int, default=32, help="s")
    add("--recovered", type=int, help="s'; default 2·s")
    add("--residual", type=float, default=0.0, help="ρ, what the server keeps in the sketch")
    add("--settings", nargs="*", default=[], metavar="NAME=VALUE", help="of the uplink, what has no option here")
    add("--seed", type=int, default=0)
    add("--devices_at_once", type=int, help="in memory together; default: what 1 GiB holds")
    add("--evaluate_every", type=int, default=1)
    add("--most_skipped", type=int, default=10, help="rounds in a row without an update after which the run ends")
    add("--checkpoint_every", type=int, default=10)
    add("--output_dir", default="outputs/federated_mnist")
    add("--resume", action="store_true", help="go on from the last checkpoint of --output_dir")
    add("--overwrite", action="store_true", help="begin anew where --output_dir holds a run")
    add(
        "--sweep",
        choices=("selection", "antennas", "noisy", "steps", "all"),
        help="a figure of the papers instead of one run",
    )
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    args = make_parser().parse_args(argv)
    if args.ofdm_symbols is None and link_names(args)[0] in ("digital", "selection"):
        args.ofdm_symbols = 200
    if args.lr is None:
        args.lr = 0.5 if args.dataset == "digits" else 0.1
    return args


def main(argv: list[str] | None = None) -> int:
    """Run, or print in a sentence why not; return the exit status."""
    args = parse(argv)

    def checked() -> int:
        check_options(args, make_parser(), LOWEST)
        for option in ("snr_db", "snr_up_db"):
            if getattr(args, option) is not None:
                check_snr(f"--{option}", getattr(args, option))
        if args.sweep:
            import federated_sweeps

            return federated_sweeps.sweep(args, open_data, simulation)
        return run(args)

    return federated_runs.said(checked)


if __name__ == "__main__":
    sys.exit(main())

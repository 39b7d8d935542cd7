"""Fine-tune a language model over the air: devices send sketches of their updates, and the radio adds them up.

    python recipes/federated_finetune.py                       # all on its own: the tiny Llama, 8 devices
    python recipes/federated_finetune.py --uplink ideal        # without radio and sketches, to compare with
    python recipes/federated_finetune.py --resume              # after kill -9; bit-equal
    python recipes/federated_finetune.py --model_name_or_path MODEL --dataset rows.jsonl --max_length 128

Without arguments it teaches the small Llama of `recipes/assets/tiny-llama` to follow instructions that lie on eight
devices, a third of the numbers that a dense update has being sent by each, at an SNR of 20 dB. Data are what
`finetune.py` takes: rows of instructions, conversations or text. `--split instruction` gives every wording of the
instructions a device of its own. The folder `--output_dir` gets rows.jsonl (a row a round), the model and a checkpoint.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import federated_runs
import text_data
from federated import partition
from federated.arguments import check_options
from federated.channel import MultipleAccess, check_snr
from federated.device import IGNORED, LocalTraining
from federated.files import opening
from federated.schemes import UPLINKS, make_uplink, read_settings
from federated.simulate import Simulation
from federated.uplink import SketchedUplink, Uplink
from sgc import SGC
from word_tasks import instruction_rows

HERE = Path(__file__).resolve().parent
EMBEDDED = {"train": 4800, "test": 320}


def examples(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, notes: text_data.Notes
) -> tuple[dict[str, Tensor], Dataset]:
    """Tokenize rows, answers alone bearing loss, padded to one length; the rows that gave an example come along."""
    layout = text_data.find_layout(rows.column_names, {}, "auto")
    if layout.kind == "classification":
        raise ValueError(f"rows must be instructions, conversations or text, got {', '.join(rows.column_names)}")
    made, kept = [], []
    for number in range(len(rows)):
        own = text_data.generation_examples(
            rows.select([number]), layout, tokenizer, max_length=max_length, answers_only=True, notes=notes
        )
        made += own
        kept += [number] * len(own)
    if not made:
        raise ValueError(f"no example is left of {len(rows)} rows{notes.left_out()}")
    width = max(len(example["input_ids"]) for example in made)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(made), width), pad or 0)
    labels = torch.full((len(made), width), IGNORED)
    for row, example in enumerate(made):
        ids[row, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
        labels[row, : len(example["labels"])] = torch.tensor(example["labels"])
    return {"input_ids": ids, "labels": labels}, rows.select(kept)


def open_rows(args: argparse.Namespace, notes: text_data.Notes) -> tuple[Dataset, Dataset]:
    """Open training and test rows: the embedded task's, or the user's."""
    if args.dataset is None:
        sizes = {"train": 320, "test": 32} if args.smoke else EMBEDDED
        made = [Dataset.from_list(instruction_rows(sizes[n], test=n == "test", seed=0)) for n in ("train", "test")]
        return made[0], made[1]
    with opening("the data set", args.dataset):
        return text_data.split(args.dataset, None, config=None, eval_fraction=0.05, seed=args.seed, notes=notes)


def open_uplink(args: argparse.Namespace, size: int) -> Uplink:
    """Make the uplink, for d = size."""
    name, over = ("sketched", "blind") if args.uplink == "blind" else (args.uplink, "analog")
    sketch = {name: getattr(args, name) for name in ("chunk_size", "sketch_size", "sparsity", "recovered", "residual")}
    known = {name: getattr(args, name) for name in ("antennas", "threshold")}
    channel = MultipleAccess.from_snr(args.snr_db, subchannels=args.subchannels)
    known |= {"channel": channel, "size": size, "over": over, "sketch": sketch | {"method": "gomp"}}
    return make_uplink(name, read_settings(args.settings), **known)


def open_optimizer(args: argparse.Namespace) -> Any:
    """Return what makes the optimizer of the local steps."""
    if args.optimizer == "sgc":
        return partial(SGC, lr=args.lr, sketch_size=0, sparsity=64, chunk_size=256)
    return partial({"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[args.optimizer], lr=args.lr)


def open_model(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open the model and its tokenizer, which gets a plain chat template where it has none."""
    trusted = {"trust_remote_code": args.trust_remote_code}
    with opening("the model", args.model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, **trusted)
        # the fused attention has no batched form over devices; written out, it has
        model = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path, dtype=torch.float32, attn_implementation="eager", **trusted
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = text_data.plain_template(tokenizer)
    return model, tokenizer


def simulation(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path
) -> Simulation:
    """Make the simulation of a run: every device with examples of its own."""
    notes = text_data.Notes()
    train_rows, test_rows = open_rows(args, notes)
    train, train_rows = examples(train_rows, tokenizer, args.max_length, notes)
    test, _ = examples(test_rows, tokenizer, args.max_length, notes)
    for line in notes.lines():
        tqdm.write(f"note: {line}")
    if args.split == "iid":
        parts: list[np.ndarray] = partition.iid(train_rows, args.devices, seed=args.seed)
    else:
        parts = partition.by_column(train_rows, args.split)
    local = LocalTraining(model=model, steps=args.steps, batch_size=args.batch_size, optimizer=open_optimizer(args))
    return Simulation(
        local,
        train,
        parts,
        test=test,
        uplink=open_uplink(args, local.flat.size),
        asked=args.participants,
        seed=args.seed,
        devices_at_once=args.devices_at_once,
        evaluate_every=args.evaluate_every,
        output_dir=out,
        checkpoint_every=args.checkpoint_every,
    )


def summary(sim: Simulation) -> str:
    """Return what takes part in a run, and how much a device sends."""
    world, size = sim.world, sim.world.training.flat.size
    sent = math.prod(world.uplink.sketch_shape(size)) if isinstance(world.uplink, SketchedUplink) else size
    return (
        f"{len(world.parts)} devices, {len(world.data['labels']):,} examples, {size:,} parameters; a device sends "
        f"{sent:,} numbers a round, {sent / size:.3f} of a dense update"
    )


def run(args: argparse.Namespace) -> int:
    """Train, with everything written to the output folder; return the exit status."""
    out = federated_runs.folder_of(args)
    model, tokenizer = open_model(args)
    sim = simulation(args, model, tokenizer, out)
    federated_runs.resume(sim, args)
    tqdm.write(summary(sim))
    tqdm.write(" round     loss  accuracy of the answers' tokens   NMSE up  channel uses  seconds")
    for row in federated_runs.rounds(sim, args.rounds):
        if row["skipped"]:
            tqdm.write(f"{row['round']:6d}  skipped: {row['skipped']}")
        elif "loss" in row:
            tqdm.write(
                f"{row['round']:6d} {row['loss']:8.4f} {row['accuracy']:33.4f} {row['nmse_up']:9.2e} "
                f"{row['channel_uses_up']:13,d} {row['seconds']:8.2f}"
            )
    tokenizer.save_pretrained(out / "model")
    return federated_runs.finish(sim, out, args.rounds)


LOWEST = {"checkpoint_every": 0, "seed": 0, "snr_db": -math.inf}


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", default=str(HERE / "assets" / "tiny-llama"))
    add("--dataset", help="what finetune.py takes; default: the embedded task")
    add("--max_length", type=int, default=128, help="tokens")
    add("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    add("--split", default="iid", help="iid, or a column whose every value is a device")
    add("--devices", type=int, default=8, help="M of --split iid")
    add("--participants", type=int, help="devices asked in a round; default all")
    add("--rounds", type=int, default=40)
    add("--steps", type=int, default=4, help="τ, local steps")
    add("--batch_size", type=int, default=16)
    add("--optimizer", choices=("sgd", "adamw", "sgc"), default="adamw", help="of the local steps")
    add("--lr", type=float, default=1e-3, help="η")
    uplinks = dict.fromkeys(("sketched", "ideal", "analog", "blind", *UPLINKS))
    add("--uplink", choices=uplinks, default="sketched", help="blind: sketched too")
    add("--snr_db", type=float, default=20.0, help="mean SNR of a subchannel")
    add("--subchannels", type=int, default=1024, help="F")
    add("--threshold", type=float, default=0.2, help="λ")
    add("--antennas", type=int, default=64, help="N_r of the blind uplink")
    add("--chunk_size", type=int, default=256, help="n")
    add("--sketch_size", type=int, default=85, help="k")
    add("--sparsity", type=int, default=10, help="s")
    add("--recovered", type=int, default=20, help="s'")
    add("--residual", type=float, default=0.0, help="ρ, what the server keeps in the sketch")
    add("--settings", nargs="*", default=[], metavar="NAME=VALUE", help="of the uplink, what has no option here")
    add("--seed", type=int, default=0)
    add("--devices_at_once", type=int)
    add("--evaluate_every", type=int, default=5)
    add("--checkpoint_every", type=int, default=5)
    add("--output_dir", default="outputs/federated_finetune")
    add("--resume", action="store_true", help="go on from the last checkpoint of --output_dir")
    add("--overwrite", action="store_true", help="begin anew where --output_dir holds a run")
    add("--smoke", action="store_true", help="two small rounds, to see that it runs")
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    args = make_parser().parse_args(argv)
    if args.smoke:
        args.rounds, args.steps, args.devices, args.batch_size = 2, 1, 2, 4
    return args


def main(argv: list[str] | None = None) -> int:
    """Run, or print in a sentence why not; return the exit status."""
    args = parse(argv)

    def checked() -> int:
        check_options(args, make_parser(), LOWEST)
        check_snr("--snr_db", args.snr_db)
        return run(args)

    return federated_runs.said(checked)


if __name__ == "__main__":
    sys.exit(main())

"""The command `sgc`: `sgc plan MODEL` says what fits, `sgc doctor` what this machine can run."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; gives its exit code: 0, or 2 where what was asked is not possible."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        return _plan(given) if given.command == "plan" else _doctor()
    except (ValueError, ImportError) as error:  # of what was asked, in one sentence
        print(f"sgc {given.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """Says in one line what it does not understand."""

    def error(self, message: str) -> NoReturn:
        """End with code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def _plan(given: argparse.Namespace) -> int:
    from sgc.planner import plan
    from sgc.planner.report import check_plot

    if given.strategy is not None and given.world_size is None:
        raise ValueError(f"--strategy {given.strategy} needs --world-size, the number of devices")
    if given.plot is not None:
        check_plot(given.plot)  # before a minute's work
    found = plan(
        given.model,
        gpu_memory=given.gpu_memory,
        batch_size=given.batch_size,
        sequence_length=given.sequence_length,
        gradient_checkpointing=given.gradient_checkpointing,
        dtype=given.dtype,
        loss=given.loss,
        world_size=1 if given.world_size is None else given.world_size,
        strategy=given.strategy or "ddp",
        reserve=given.reserve,
        lora_rank=given.lora_rank,
        galore_rank=given.galore_rank,
        apollo_rank=given.apollo_rank,
        trust_remote_code=given.trust_remote_code,
    )
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not know all letters of a folder's name
        sys.stdout.reconfigure(errors="backslashreplace")
    print(found.json() if given.json else found.table(color))
    if given.plot is not None:
        found.save_plot(given.plot)
    return 0


def _doctor() -> int:
    from sgc.doctor import report

    print(report())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sgc", description="Sparse gradient compression.")
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser(
        "plan",
        help="say what a training step needs under each optimizer, and what fits",
        description="Plan a training step of a model on one or several devices, under each optimizer, without making a "
        "weight.",
    )
    plan.add_argument("model", help="a built-in shape such as llama-3-8b, a folder, a config.json or a hub name")
    plan.add_argument("--gpu-memory", metavar="SIZE", help='of a device, with its unit: "24GB", "24GiB"')
    plan.add_argument("--batch-size", type=int, default=1, metavar="N", help="rows on each device (1)")
    plan.add_argument(
        "--sequence-length", type=int, metavar="N", help="tokens of a row (2048, or all the model's positions)"
    )
    plan.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations in backward")
    plan.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"), help="of the weights (bf16)")
    plan.add_argument("--loss", default="plain", choices=("plain", "chunked"), help="how logits become a loss (plain)")
    plan.add_argument("--world-size", type=int, metavar="N", help="devices (1)")
    plan.add_argument(
        "--strategy", choices=("ddp", "fsdp2", "zero1", "zero2", "zero3"), help="how the devices share (ddp)"
    )
    plan.add_argument("--reserve", metavar="SIZE", help="kept for what is not tensors, with its unit (1GB)")
    plan.add_argument("--lora-rank", type=int, default=8, metavar="R")
    plan.add_argument("--galore-rank", type=int, default=128, metavar="R")
    plan.add_argument("--apollo-rank", type=int, default=256, metavar="R")
    plan.add_argument(
        "--trust_remote_code",
        "--trust-remote-code",
        action="store_true",
        help="let the code run that a model brings along",
    )
    plan.add_argument("--json", action="store_true", help="print the plan as JSON, in bytes")
    plan.add_argument("--plot", metavar="FILE.png", help="draw it, too")
    commands.add_parser("doctor", help="say what this machine can run, and on which path")
    return parser


if __name__ == "__main__":
    sys.exit(main())

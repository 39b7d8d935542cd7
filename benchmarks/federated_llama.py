"""The small Llama fine-tuned over the air: what its sketches lose against error-free links, row by row.

python benchmarks/federated_llama.py                  # every uplink; one that was stopped goes on with the same command
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "recipes"))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import federated_finetune
import text_data
from benchmarks import harness
from federated.metrics import evaluate

RESULTS = "federated_llama"
UPLINKS = ("sketched", "ideal", "analog")


def untrained() -> dict[str, float]:
    """Judge the model that training starts from, as the recipe judges it."""
    args, notes = federated_finetune.parse([]), text_data.Notes()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=False)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = text_data.plain_template(tokenizer)
    _, rows = federated_finetune.open_rows(args, notes)
    test, _ = federated_finetune.examples(rows, tokenizer, args.max_length, notes)
    return evaluate(
        AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=torch.float32, trust_remote_code=False),
        test,
    )


def main() -> None:
    """Run the recipe with its defaults over each uplink, and keep its curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uplink", choices=UPLINKS, action="append")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/federated_llama"))
    args = parser.parse_args()
    for uplink in args.uplink or UPLINKS:
        if any(row["uplink"] == uplink for row in harness.rows(RESULTS)):
            continue
        out = args.output_dir / uplink
        if federated_finetune.main(["--uplink", uplink, "--output_dir", str(out), "--resume"]):
            sys.exit(1)
        rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
        curve = [(row["round"], round(row["loss"], 4), round(row["accuracy"], 4)) for row in rows if "loss" in row]
        before = untrained()
        last = {name: rows[-1][name] for name in ("channel_uses_up", "nmse_up", "power_up", "participants")}
        harness.add_row(RESULTS, {"uplink": uplink, "rounds": len(rows), "before": before, "curve": curve, **last})


if __name__ == "__main__":
    main()

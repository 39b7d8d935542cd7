"""Do adapters learn as well with SGC as with AdamW, and what is held? LoRA on the small Llama, text of SST-2.

    SGC_SHARED_DATA=folder python benchmarks/adapters.py    # folder holds glue/SST-2/train.tsv

Both optimizers see the same batches from the same start, at each of three learning rates; the loss is on text held out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import add_row, rows
from sgc.hf import create_sgc_optimizer

LLAMA = Path(__file__).parents[1] / "recipes" / "assets" / "tiny-llama"
RATES, SEEDS = (3e-3, 1e-2, 3e-2), (0, 1, 2)
LENGTH, BATCH, STEPS, WARMUP, HELD_OUT = 96, 4, 100, 10, 64
RANK = 8


def passages() -> tuple[torch.Tensor, torch.Tensor]:
    """Cut sentences, one after another, into passages to learn from and passages to judge by: (count, LENGTH)."""
    from transformers import AutoTokenizer

    path = Path(os.environ["SGC_SHARED_DATA"]) / "glue" / "SST-2" / "train.tsv"
    lines = path.read_text(encoding="utf-8").splitlines()[1:4001]
    ids = AutoTokenizer.from_pretrained(LLAMA, trust_remote_code=False)(
        "\n".join(line.split("\t")[0] for line in lines)
    )["input_ids"]
    cut = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
    return cut[:-HELD_OUT], cut[-HELD_OUT:]


def train(optimizer_name: str, rate: float, seed: int) -> dict[str, Any]:
    """Train adapters once."""
    import peft
    from transformers import AutoModelForCausalLM

    learned, judged = passages()
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32, trust_remote_code=False), config
    )
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer: torch.optim.Optimizer
    if optimizer_name == "AdamW":
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    else:
        optimizer = create_sgc_optimizer(model, lr=rate, weight_decay=0.0, min_size=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1, (t + 1) / WARMUP) * (1 - t / STEPS))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        ids = learned[torch.randint(len(learned), (BATCH,), generator=generator)]
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        loss = model.eval()(input_ids=judged, labels=judged).loss.item()
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    return {"loss": loss, "state_bytes": held, "parameters": sum(param.numel() for param in trained)}


def main() -> None:
    """Run what has no row yet."""
    known = {(row["optimizer"], row["rate"], row["seed"]) for row in rows("adapters")}
    for seed in SEEDS:
        for rate in RATES:
            for name in ("AdamW", "SGC(min_size=0)"):
                if (name, rate, seed) not in known:
                    row = {"optimizer": name, "rate": rate, "seed": seed, "steps": STEPS, "rank": RANK}
                    row |= train(name, rate, seed)
                    add_row("adapters", row)
                    print(f"{name:16} lr {rate:g} seed {seed}: loss {row['loss']:.4f}, {row['state_bytes']} bytes")


if __name__ == "__main__":
    main()

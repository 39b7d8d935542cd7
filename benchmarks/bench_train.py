"""Tokens per second of whole training steps: forward, backward and the optimizer.

    python benchmarks/bench_train.py                          # on a CPU: the Llama of recipes/assets/tiny-llama
    python benchmarks/bench_train.py --model llama-3.2-1b     # on a GPU the default: that shape, random, in bf16

All optimizers train one model, one after the other. Each one's steps are timed in turns with forward and backward
alone: "of_forward_backward" is the share of the step that these are, and compares between optimizers. SGC takes the
path that it takes by itself.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

from benchmarks import harness, peers

NAME = "train"
TINY = Path(__file__).parents[1] / "recipes" / "assets" / "tiny-llama"
OPTIMIZERS = (
    "adamw(foreach=False)",
    "adamw_fused",
    "sgd",
    "adafactor",
    "apollo_mini",
    "apollo(rank=128)",
    "adamw8bit",
    "sgc",
    "sgc(sketch_size=8)",
    "sgc(sketch_size=32)",
    "attached",
    "attached(sketch_size=32)",
)


def load_model(name: str, device: torch.device) -> tuple[nn.Module, int]:
    """Return a Llama and its vocabulary size: the recipes' small one, or a random one of the 1B shape in bf16."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if name == "tiny":
        model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32, trust_remote_code=False)
    else:
        sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}
        with torch.device(device):
            torch.set_default_dtype(torch.bfloat16)
            try:
                model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=4096))
            finally:
                torch.set_default_dtype(torch.float32)
    return model.to(device).train(), model.config.vocab_size


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "llama-3.2-1b"))
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--seconds", type=float, default=20.0, help="for the steps of one optimizer")
    parser.add_argument("--optimizer", action="append", help="a spec as of benchmarks/peers.py; default: all")
    parser.add_argument("--smoke", action="store_true", help="short sequences, no rows")
    arguments = parser.parse_args()
    device = harness.device_of(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    name = arguments.model or ("llama-3.2-1b" if device.type == "cuda" else "tiny")
    length = 16 if arguments.smoke else arguments.sequence_length or (512 if device.type == "cuda" else 128)
    seconds = 0.5 if arguments.smoke else arguments.seconds
    model, vocabulary = load_model(name, device)
    start = [param.detach().clone() for param in model.parameters()]
    ids = torch.randint(vocabulary, (arguments.batch_size, length), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    specs = arguments.optimizer or list(OPTIMIZERS)
    shared = {"model": name, "device": device.type, "batch_size": arguments.batch_size, "sequence_length": length}
    shared["parameters"] = sum(param.numel() for param in model.parameters())

    def reset() -> None:
        with torch.no_grad():
            for param, first in zip(model.parameters(), start, strict=True):
                param.copy_(first)
                param.grad = None

    rows = []
    for spec in specs:  # one after the other: the hooks of "attached" belong to the model
        if (reason := peers.why_not(peers.parse(spec)[0])) is not None:
            rows.append({**shared, "optimizer": spec, "not_installed": reason})
            print(rows[-1])
            continue
        reset()
        try:
            rows.append({**shared, **measure(spec, model, ids, seconds)})
        except Exception as error:  # a peer's failure is its result, and no reason to lose the others
            if spec.startswith(("sgc", "attached")):
                raise
            rows.append({**shared, "optimizer": spec, "failed": f"{type(error).__name__}: {error}"[:300]})
        print(rows[-1], flush=True)
        gc.collect()
    for row in rows if not arguments.smoke else ():
        harness.add_row(NAME, {**row, "load_average": os.getloadavg()[0]})


def measure(spec: str, model: nn.Module, ids: torch.Tensor, seconds: float) -> dict[str, Any]:
    """Time whole steps in turns with forward and backward alone, so that disturbances slow both alike."""
    device = ids.device
    optimizer = peers.make(spec, model, 1e-6).optimizer

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    trained = [param for param in model.parameters() if param.requires_grad]

    def without() -> None:
        torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained)

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        step()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    found = harness.interleave({"step": step, "without": without}, device, repeats=30, seconds=seconds, warm_up=1)
    if spec.startswith("attached"):
        optimizer.detach()
    clock = "cpu_p50" if device.type == "cpu" else "p50"
    row = {"optimizer": spec, "ms": found["step"], "forward_backward_ms": found["without"]}
    row["tokens_per_s"] = round(ids.numel() / found["step"][clock] * 1e3, 1)
    row["of_forward_backward"] = round(found["without"][clock] / found["step"][clock], 4)
    return row | {"state_bytes": peers.state_bytes(optimizer), "peak_bytes": peak}


if __name__ == "__main__":
    main()

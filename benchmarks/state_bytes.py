"""How large is the state? Predicted for whole models, everything counted, without making a weight.

    python benchmarks/state_bytes.py

That the prediction is what is held is a law with tests (tests/test_memory.py).
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import add_row
from sgc import SGC

LLAMAS: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
    "Llama-2-13B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
    },
    "Llama-3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
SETTINGS: dict[str, dict[str, Any]] = {
    "SGC()": {},
    "SGC(sketch_size=8)": {"sketch_size": 8},
    "SGC(sketch_size=32)": {"sketch_size": 32},
}


def main() -> None:
    """Predict, print and store."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    warnings.simplefilter("error")
    print(f"{'model':12} {'optimizer':22} {'GB':>8} {'of AdamW fp32':>14}")
    for name, sizes in LLAMAS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), trust_remote_code=False)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        adamw = 8 * parameters
        expected = {"AdamW, fp32": adamw} | {
            label: SGC(model.parameters(), **kwargs).expected_state_bytes() for label, kwargs in SETTINGS.items()
        }
        for label, held in expected.items():
            row = {"model": name, "parameters": parameters, "optimizer": label, "state_bytes": held}
            add_row("state_bytes", {**row, "state_ratio": held / adamw})
            print(f"{name:12} {label:22} {held / 1e9:8.3f} {held / adamw:14.5f}")


if __name__ == "__main__":
    main()

"""How many bytes of gradients exist at once, and how many travel between ranks: whole and compressed.

    python benchmarks/gradients.py            # a Llama of 12 layers on a CPU, two processes for the wire

Gradients alive are counted at every arrival of a new one, by the storages still held, and so are the sums that
compressed gradients leave. What DistributedDataParallel sends is counted by a communication hook.
"""

from __future__ import annotations

import os
import socket
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import add_row
from sgc import SGC

RESULT = "gradients"
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "whole": ({}, None),
    "sample_every=8": ({}, {"sample_every": 8}),
    "sample_every=32": ({}, {"sample_every": 32}),
    "sketch_size=32": ({"sketch_size": 32}, {}),
    "sketch_size=8": ({"sketch_size": 8, "sparsity": 1}, {}),
}


def make_model() -> torch.nn.Module:
    """Make a Llama of 12 equal layers, 17.7M parameters, in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=320, intermediate_size=880, num_hidden_layers=12, num_attention_heads=8, vocab_size=4096
    )
    return LlamaForCausalLM(config)


def measure(setting: str) -> dict[str, Any]:
    """Count bytes in two backward passes and a step with one setting."""
    kwargs, attach = SETTINGS[setting]
    model = make_model()
    layer = sum(param.numel() for param in model.model.layers[0].parameters()) * 4
    trained = sum(param.numel() for param in model.parameters()) * 4
    optimizer = SGC(model.parameters(), lr=1e-3, **kwargs)
    if attach is not None:
        optimizer.attach(model, **attach)
    alive: list[weakref.ref[Any]] = []
    peak = {"gradient_bytes": 0, "with_sums_bytes": 0}

    def watch(gradient: torch.Tensor) -> None:
        alive.append(weakref.ref(gradient.untyped_storage()))
        held = {id(storage): storage.nbytes() for ref in alive if (storage := ref()) is not None}
        sums = 0 if optimizer._compressor is None else optimizer._compressor.bytes()
        peak["gradient_bytes"] = max(peak["gradient_bytes"], sum(held.values()))
        peak["with_sums_bytes"] = max(peak["with_sums_bytes"], sum(held.values()) + sums)

    for param in model.parameters():
        param.register_hook(watch)
    ranks, sent = dist.get_world_size(), 0
    network = model
    if ranks > 1:
        network = torch.nn.parallel.DistributedDataParallel(model)

        def count(state, bucket):  # bare: torch compares annotations with its class, and here they are strings
            nonlocal sent
            sent += bucket.buffer().numel() * bucket.buffer().element_size()
            work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
            return work.then(lambda done: done.value()[0] / ranks)

        network.register_comm_hook(None, count)
    tokens = torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(dist.get_rank()))
    network(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    sent += int(optimizer.stats().get("reduced_bytes", 0))
    return {
        "setting": setting,
        "ranks": ranks,
        **peak,
        "layer_bytes": layer,
        "all_gradients_bytes": trained,
        "layers_alive": peak["gradient_bytes"] / layer,
        "sent_bytes": sent,
        "parameters": trained // 4,
    }


def run(rank: int, ranks: int, port: int) -> None:
    """Measure every setting in one process of `ranks`."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for setting in SETTINGS:
        row = measure(setting)
        if rank == 0:
            add_row(RESULT, row)
            print(
                f"{ranks} ranks, {setting}: {row['gradient_bytes'] / 1e6:.1f} MB of gradients at most "
                f"({row['layers_alive']:.2f} layers), {row['with_sums_bytes'] / 1e6:.1f} MB with sums, "
                f"{row['sent_bytes'] / 1e6:.1f} MB sent",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    """Measure with one process and with two."""
    for ranks in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(run, args=(ranks, port), nprocs=ranks)


if __name__ == "__main__":
    main()

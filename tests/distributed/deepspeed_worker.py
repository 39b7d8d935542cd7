"""What the processes of test_deepspeed.py run: a small model under ZeRO, and the same in one process."""

import gc
import math
import os
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from sgc import SGC

BATCH, LENGTH, WORDS, WIDTH, LABELS = 8, 6, 67, 72, 13
LR = 3e-3
FLAT_12 = ("single_partition_of_fp32_groups", "base_optimizer_state")


class Small(nn.Module):
    """Matrices whose rows share chunks, fill chunks and are cut in pieces; norms; and a group of two entries."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.up = nn.Linear(WIDTH, 300)
        self.norm = nn.LayerNorm(300)
        self.down = nn.Linear(300, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, LABELS * 6)
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, words):
        x = self.embedding(words).mean(1)
        x = x + self.down(functional.gelu(self.norm(self.up(x))))
        return self.head(x) * self.gain.mean() + self.gain[0]


def new_model():
    torch.manual_seed(0)
    return Small()


def new_optimizer(model, **kwargs):
    """Three groups: what decays, what does not, and the two entries, which leave a rank of two with padding alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for n, p in model.named_parameters() if p.dim() == 1 and n != "gain"]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
        {"params": [model.gain], "weight_decay": 0.0},
    ]
    return SGC(groups, lr=LR, min_size=512, chunk_size=64, **kwargs)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(0, WORDS, (BATCH, LENGTH), generator=generator)
    return words, words.sum(1) % (LABELS * 6)


def loss_of(model, words, labels):
    return functional.cross_entropy(model(words).float(), labels)


def alone(steps, clip=0.0, micro=1, **kwargs):
    """Train in one process: weights after the steps."""
    model = new_model()
    optimizer = new_optimizer(model, **kwargs)
    optimizer.check_ranks = False
    for step in range(steps):
        for words, labels in zip(*(part.chunk(micro) for part in batch(step)), strict=True):
            (loss_of(model, words, labels) / micro).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def no_compiler():
    """DeepSpeed would compile its shared-memory operator for a CPU first, which takes minutes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def prepare(stage, *, zero=None, config=None, micro=1, kwargs=None):
    """Give accelerator, engine and SGC of a new model under ZeRO."""
    no_compiler()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    AcceleratorState._reset_state(True)
    settings = {
        "train_micro_batch_size_per_gpu": BATCH // micro // torch.distributed.get_world_size(),
        "gradient_accumulation_steps": micro,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100, **(zero or {})},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **(config or {}),
    }
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
        gradient_accumulation_steps=micro,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    model = new_model()
    sgc = new_optimizer(model, **(kwargs or {}))
    engine, optimizer = accelerator.prepare(model, sgc)
    return accelerator, engine, optimizer, sgc


def weights_of(engine):
    import deepspeed

    params = list(engine.module.parameters())
    names = [name for name, _ in engine.module.named_parameters()]
    if engine.zero_optimization_stage() < 3:
        return {name: param.detach().float().clone() for name, param in zip(names, params, strict=True)}
    with deepspeed.zero.GatheredParameters(params):
        return {name: param.detach().float().clone() for name, param in zip(names, params, strict=True)}


def together(stage, first, last, *, load=None, save=None, poison=None, micro=1, **options):
    """Train under ZeRO from step `first` to step `last`: weights, losses and what SGC says.

    Args:
        load: folder of a checkpoint to go on from.
        save: folder in which to leave one.
        poison: (step, name): rank 1's gradient of this parameter is not finite there.
    """
    accelerator, engine, optimizer, sgc = prepare(stage, micro=micro, **options)
    from sgc.hf import left_out  # after DeepSpeed, which transformers looks for

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    poisoned = []
    if poison is not None and rank == 1:
        param = dict(engine.module.named_parameters())[poison[1]]
        param.register_hook(lambda grad: grad * math.nan if poisoned else grad)
    try:
        if load is not None:
            engine.load_checkpoint(load)
        losses, before = [], weights_of(engine)
        for step in range(first, last):
            if poison is not None and step == poison[0]:
                poisoned.append(True)
                before = weights_of(engine)
            for part in zip(*(part.chunk(micro) for part in batch(step)), strict=True):
                words, labels = (half.chunk(ranks)[rank] for half in part)
                with accelerator.accumulate(engine):
                    loss = loss_of(engine, words, labels)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            if poisoned:
                poisoned.clear()
                changed = {n for n, w in weights_of(engine).items() if not torch.equal(w, before[n])}
        if save is not None:
            engine.save_checkpoint(save)
        return {
            "weights": weights_of(engine),
            "losses": losses,
            "stats": sgc.stats(),
            "changed": changed if poison is not None else None,
            "left out": left_out(sgc, engine.module),
            "names": sorted({name.partition(".")[2] for held in sgc.state.values() for name in held}),
        }
    finally:
        accelerator.free_memory()
        engine.destroy()
        gc.collect()


def refusal(function, *args, **kwargs):
    """Give what a call says when it refuses."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def together_says(*args, **kwargs):
    return refusal(together, *args, **kwargs)


def files_of(folder):
    return sorted(file.name for file in Path(folder).rglob("*") if file.is_file())

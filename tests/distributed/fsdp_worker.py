"""What the ranks of tests/test_sharded.py run, in processes that stay up."""

from __future__ import annotations

import logging
import math
import os
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import Placement

from sgc import SGC
from sgc.codec.encode import encode
from sgc.loop import rates_now
from sgc.step import finish, update
from sgc.views import View
from tests.distributed.fsdp_on_cpu import pretend

WORLD = 2
# even and uneven rows; experts, two and one; a convolution; an embedding; one row of many chunks: rank 1 has none
ALIGNED = [(64, 96), (33, 40), (3, 16, 64), (8, 4, 3, 3), (50, 64), (1, 640)]
# 50 short rows, 4 to a chunk: the boundary cuts one; a vector; 70 rows, 8 to a chunk; one row with a padded tail
CUT = [(50, 8), (1031,), (70, 4), (1, 641)]
SMALL = [(5,), (3, 3)]
EVERYWHERE = ALIGNED + CUT + SMALL
SAFE = [DTensor, DeviceMesh, Replicate, Shard, Placement]


class Shapes(nn.Module):
    """Parameters of given shapes under a loss whose gradient is another for every sample."""

    def __init__(self, shapes, dtype=torch.float32, compute=torch.float32):
        super().__init__()
        self.compute = compute
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator).mul_(0.1).to(dtype)) for shape in shapes
        )

    def forward(self, samples):
        loss = torch.zeros(())
        for number, weight in enumerate(self.weights):
            for sample in samples:
                generator = torch.Generator().manual_seed(1000 * sample + number)
                slope = torch.randn(weight.shape, generator=generator)
                scale = torch.rand(weight.shape[:1], generator=generator).add_(0.1)
                slope *= scale.view(-1, *[1] * (weight.dim() - 1))
                seen = weight.to(self.compute).float()
                loss = loss + (seen * slope + 0.05 * seen.square()).sum() / len(samples)
        return loss


def optimizer_of(model, **options):
    defaults = {"lr": 1e-2, "weight_decay": 0.1, "chunk_size": 32, "min_size": 10, "seed": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # small sketches
        return SGC(model.parameters(), **{**defaults, **options})


def train(model, optimizer, steps, rank=None, change=None):
    """Train on samples 2t and 2t + 1; with a rank, on that one of them."""
    for number in steps:
        samples = [2 * number, 2 * number + 1] if rank is None else [2 * number + rank]
        model(samples).backward()
        if change is not None:
            change(number, model)
        optimizer.step()
        optimizer.zero_grad()


def sharded_model(shapes, dtype=torch.float32, mesh=None, **policy):
    return fully_shard(Shapes(shapes, dtype), mesh=mesh or init_device_mesh("cpu", (WORLD,)), **policy)


def own_mesh():
    """A mesh of this rank alone."""
    for rank in range(WORLD):  # every rank takes part in the making of every group
        group = dist.new_group([rank])
        if rank == dist.get_rank():
            mine = DeviceMesh.from_group(group, "cpu")
    return mine


def whole_weights(model):
    """All weights in full, by copies."""
    full = [w.detach().full_tensor() if isinstance(w, DTensor) else w.detach() for w in model.parameters()]
    return [w.clone() for w in full]


def whole_state(optimizer):
    """All state in full, by copies, in the order of the parameters."""
    held = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
    return [{k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in one.items()} for one in held]


def gap(one, other):
    """The largest difference of two lists of tensors, over the largest entry."""
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-12))
        for a, b in zip(one, other, strict=True)
    )


def changes(model, shapes, dtype=torch.float32):
    """What training has added to the weights."""
    start = Shapes(shapes, dtype).parameters()
    return [weight.float() - old.detach().float() for weight, old in zip(whole_weights(model), start, strict=True)]


def same_bits(one, other):
    """Whether two trained pairs of model and optimizer hold the same bits."""
    pairs = zip(whole_weights(one[0]), whole_weights(other[0]), strict=True)
    states = zip(whole_state(one[1]), whole_state(other[1]), strict=True)
    equal = [
        a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a) for a, b in states
    ]
    return all(torch.equal(a, b) for a, b in pairs) and all(equal)


def equal_over_ranks(tensors):
    """Whether every rank holds the same bits."""
    flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors])
    all_flat = [torch.empty_like(flat) for _ in range(WORLD)]
    dist.all_gather(all_flat, flat)
    return all(torch.equal(flat, other) for other in all_flat)


# --------------------------------------------------------------------------------------------------- the jobs


def agree(shapes, steps=6, dtype="float32", mesh=None, compute=None, **options):
    """Train on two ranks and in one process, and say how far apart they come out."""
    dtype, policy = getattr(torch, dtype), {}
    one = Shapes(shapes, dtype)
    if compute is not None:
        one.compute = getattr(torch, compute)
        policy["mp_policy"] = MixedPrecisionPolicy(param_dtype=one.compute, reduce_dtype=torch.float32)
    reference = optimizer_of(one, **options)
    train(one, reference, range(steps))
    if mesh is not None:
        mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard"))
    model = sharded_model(shapes, dtype, mesh, **policy)
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, range(steps), dist.get_rank())
    weights, states, wanted = whole_weights(model), whole_state(optimizer), whole_state(reference)
    assert [{k: v.shape for k, v in s.items()} for s in states] == [{k: v.shape for k, v in s.items()} for s in wanted]
    moved, goal = changes(model, shapes, dtype), changes(one, shapes, dtype)
    off = [(a - b).abs() > 1e-3 * b.abs().max() for a, b in zip(moved, goal, strict=True)]
    names = {name for held in wanted for name in held} - {"step"}
    held = sum(t.numel() * t.element_size() for t in optimizer._loop.probes.tensors())
    held += sum(projection.bytes() for projection in optimizer._loop.projections.values())
    return {
        "weights": gap(moved, goal),
        "in ulps": max(
            float(((a - b).abs() / (torch.finfo(dtype).eps * b.abs().clamp(min=1e-3))).max())
            for a, b in zip(weights, whole_weights(one), strict=True)
        ),
        "off": float(torch.cat([o.reshape(-1) for o in off]).float().mean()),
        "state": {
            name: gap([s[name] for s in states if name in s], [s[name] for s in wanted if name in s]) for name in names
        },
        "steps": [int(held["step"]) for held in states] == [steps] * len(shapes),
        "equal over ranks": equal_over_ranks([*weights, *[s[name] for s in states for name in sorted(s)]]),
        "grad_norm": abs(optimizer.stats()["grad_norm"] / reference.stats()["grad_norm"] - 1),
        "bytes": optimizer.state_bytes() - held,
        "expected bytes": optimizer.expected_state_bytes()
        - sum(p.bytes() for p in optimizer._loop.projections.values()),
        "bytes of one process": reference.state_bytes() - held,
    }


def cut_sketches(shape, sparsity, **options):
    """Compare one step on a tensor whose chunks are cut with the sum of what each rank's entries encode."""
    options = {"sketch_size": 16, "sparsity": sparsity, "weight_decay": 0.0, "min_size": 0, **options}
    model = sharded_model([shape])
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, [0], dist.get_rank())
    one = Shapes([shape])
    reference = optimizer_of(one, **options)
    one([0, 1]).backward()
    (param,), group = one.parameters(), reference.param_groups[0]
    boundary = math.ceil(shape[0] / WORLD) * (param.numel() // shape[0])
    halves = [param.grad.clone().view(-1) for _ in range(WORLD)]
    halves[0][boundary:], halves[1][:boundary] = 0, 0
    sketches = {}

    class Cut(View):
        def encode(self, whitening, squares):
            arguments = self.seen, self.projection, sparsity, whitening
            sketches["parts"] = sum(encode(self.seen.grid(half), *arguments)[0] for half in halves)
            sketches["together"] = encode(self.grid(), *arguments)[0]
            return sketches["parts"], None
            yield []

    state, lent = reference._state_of(param, group), reference._loop._lend(0, param, group)
    view = Cut(param, param.detach(), param.grad, lambda: state, tuple(shape), group, lent)
    finish(update(view, rates_now(view)))
    return {
        "weights": gap(changes(model, [shape]), changes(one, [shape])),
        "chunks that another top would give": int(
            ((sketches["parts"] - sketches["together"]).abs().amax(1) > 1e-5).sum()
        ),
    }


def resume(folder, how, shapes, dtype="float32", **options):
    """Train six steps; train three, save, load into a fresh model and optimizer, train three. Compare the bits."""
    dtype, rank = getattr(torch, dtype), dist.get_rank()
    whole = sharded_model(shapes, dtype)
    whole_optimizer = optimizer_of(whole, **options)
    train(whole, whole_optimizer, range(6), rank)
    first = sharded_model(shapes, dtype)
    first_optimizer = optimizer_of(first, **options)
    train(first, first_optimizer, range(3), rank)
    save(Path(folder), how, first, first_optimizer)
    second = sharded_model(shapes, dtype)
    with torch.no_grad():
        for param in second.parameters():
            param.zero_()
    second_optimizer = optimizer_of(second, **options)
    load(Path(folder), how, second, second_optimizer)
    loaded = same_bits((first, first_optimizer), (second, second_optimizer))
    train(second, second_optimizer, range(3, 6), rank)
    resumed = same_bits((whole, whole_optimizer), (second, second_optimizer))
    return {"loaded": loaded, "resumed": resumed}


FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(folder, how, model, optimizer):
    if how == "torch":  # each rank its own file
        torch.save([model.state_dict(), optimizer.state_dict()], folder / f"{dist.get_rank()}.pt")
    elif how in ("full", "broadcast"):
        whole = get_state_dict(model, optimizer, options=FULL)
        if dist.get_rank() == 0:
            torch.save(whole, folder / "full.pt")
    else:
        write(folder, model, optimizer)
    dist.barrier()


def load(folder, how, model, optimizer):
    if how == "torch":
        with torch.serialization.safe_globals(SAFE):
            weights, state = torch.load(folder / f"{dist.get_rank()}.pt", weights_only=True)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    elif how in ("full", "broadcast"):
        first = dist.get_rank() == 0
        weights, state = torch.load(folder / "full.pt", weights_only=True) if how == "full" or first else ({}, {})
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=how == "broadcast")
        set_model_state_dict(model, weights, options=options)  # set_state_dict takes an empty one for none
        set_optimizer_state_dict(model, optimizer, state, options=options)
    else:
        read(folder, model, optimizer)


def write(folder, model, optimizer, **how):
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder, **how)


def read(folder, model, optimizer, **how):
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=folder, **how)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])


def other_ranks(folder, shapes, **options):
    """Save after three steps on two ranks and in one process; go on on the other number; compare with no change."""
    folder, rank = Path(folder), dist.get_rank()
    one = Shapes(shapes)
    one_optimizer = optimizer_of(one, **options)
    train(one, one_optimizer, range(3))
    if rank == 0:
        write(folder / "one", one, one_optimizer, no_dist=True)
    train(one, one_optimizer, range(3, 6))
    two = sharded_model(shapes)
    two_optimizer = optimizer_of(two, **options)
    train(two, two_optimizer, range(3), rank)
    (folder / "two").mkdir(exist_ok=True)
    save(folder / "two", "dcp", two, two_optimizer)
    goal, found = changes(one, shapes), {}

    plain = Shapes(shapes)
    plain_optimizer = optimizer_of(plain, **options)
    alone = fully_shard(Shapes(shapes), mesh=own_mesh())
    alone_optimizer = optimizer_of(alone, **options)
    for name, model, optimizer in (("plain", plain, plain_optimizer), ("FSDP2 alone", alone, alone_optimizer)):
        read(folder / "two", model, optimizer, no_dist=True)
        train(model, optimizer, range(3, 6))
        found[f"2 to 1, {name}"] = gap(changes(model, shapes), goal)
    dist.barrier()

    again = sharded_model(shapes)
    again_optimizer = optimizer_of(again, **options)
    load(folder / "one", "dcp", again, again_optimizer)
    train(again, again_optimizer, range(3, 6), rank)
    found["1 to 2"] = gap(changes(again, shapes), goal)
    return found


def whole_state_loads(shapes, **options):
    """Give a sharded optimizer the plain state_dict of a process alone, and the other way round."""
    one, two = Shapes(shapes), sharded_model(shapes)
    one_optimizer, two_optimizer = optimizer_of(one, **options), optimizer_of(two, **options)
    train(one, one_optimizer, range(2))
    two_optimizer.load_state_dict(one_optimizer.state_dict())
    back = optimizer_of(Shapes(shapes), **options)
    back.load_state_dict(two_optimizer.state_dict())
    states = [whole_state(optimizer) for optimizer in (one_optimizer, two_optimizer, back)]
    return all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) for a, b, c in zip(*states, strict=True) for k in a)


def not_finite(shapes, value, **options):
    """Put a value into the gradient of the first tensor on rank 1 only, at the second of three steps."""
    model = sharded_model(shapes)
    optimizer = optimizer_of(model, **options)
    kept = {}

    def spoil(number, model):
        if number != 1:
            return
        first = next(model.parameters())
        kept["weight"], kept["state"] = first.full_tensor().clone(), whole_state(optimizer)[0]
        kept["other"] = [w.full_tensor().clone() for w in model.parameters()][1]
        if dist.get_rank() == 1:
            first.grad.to_local().view(-1)[-1] = value

    train(model, optimizer, range(2), dist.get_rank(), spoil)
    weights, state = whole_weights(model), whole_state(optimizer)[0]
    result = {
        "left as it was": torch.equal(weights[0], kept["weight"])
        and all(torch.equal(state[k], kept["state"][k]) for k in state),
        "others moved": not torch.equal(weights[1], kept["other"]),
        "skipped": optimizer.stats()["skipped_tensors"],
        "finite": all(bool(w.isfinite().all()) for w in weights),
    }
    train(model, optimizer, range(2, 3), dist.get_rank())
    result["goes on"] = not torch.equal(whole_weights(model)[0], kept["weight"])
    result["equal over ranks"] = equal_over_ranks(whole_weights(model))
    return result


def moved(shapes, **options):
    """Move the model after every step, to where it is, as between training and generating; compare with not moving."""
    pairs = []
    for moves in (False, True):
        model = sharded_model(shapes)
        optimizer = optimizer_of(model, **options)
        for number in range(3):
            train(model, optimizer, range(number, number + 1), dist.get_rank())
            if moves:
                model.cpu()
        pairs.append((model, optimizer))
    return same_bits(*pairs)


def traffic(shapes, **options):
    """Count what a step sends: the numbers of every all-reduce, and any other collective."""
    model = sharded_model(shapes)
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, range(1), dist.get_rank())
    model([0]).backward()
    with CommDebugMode() as seen, mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
        optimizer.step()
    sent = [call.args[0].numel() for call in reduce.call_args_list]
    return {"all-reduced": sent, "collectives": seen.get_total_counts()}


def zero_gradients(shapes, **options):
    """Step with gradients of zeros: only the decay moves the weights."""
    model = sharded_model(shapes)
    optimizer = optimizer_of(model, **options)
    before = whole_weights(model)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    decay = 1 - optimizer.param_groups[0]["lr"] * optimizer.param_groups[0]["weight_decay"]
    return gap(whole_weights(model), [weight * decay for weight in before]), int(whole_state(optimizer)[0]["step"])


def rounding(**options):
    """Round the same bf16 weights under the same gradients on both ranks, and say what share of them agrees."""
    model = sharded_model([(64, 64)], torch.bfloat16)
    optimizer = optimizer_of(model, lr=1e-4, weight_decay=0.0, **options)
    (param,) = model.parameters()
    with torch.no_grad():
        param.to_local().fill_(1.0)
    half = torch.randn(32, 64, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    param.grad = DTensor.from_local(half, param.device_mesh, param.placements)
    optimizer.step()
    weight = param.full_tensor().float()
    return float((weight[:32] == weight[32:]).float().mean()), float((weight != 1).float().mean())


def refused(case):
    """Do what SGC can't, and give the sentence that says so."""
    mesh = init_device_mesh("cpu", (WORLD,))
    try:
        if case in ("FSDP1", "FSDP1 with original parameters"):
            linear = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = FullyShardedDataParallel(linear, use_orig_params=case != "FSDP1", device_id=torch.device("cpu"))
                optimizer = SGC(model.parameters())
                model(torch.ones(2, 64)).sum().backward()
            optimizer.step()
        elif case == "columns":
            param = nn.Parameter(distribute_tensor(torch.ones(64, 64), mesh, [Shard(1)]))
            step_of(param, distribute_tensor(torch.ones(64, 64), mesh, [Shard(1)]))
        elif case == "other placements":
            param = nn.Parameter(distribute_tensor(torch.ones(64, 64), mesh, [Shard(0)]))
            param.grad = distribute_tensor(torch.ones(64, 64), mesh, [Replicate()])
            SGC([param], min_size=0).step()
        elif case == "rank":
            model = sharded_model([(64, 96)])
            train(model, optimizer_of(model, rank=4), range(1), dist.get_rank())
        elif case == "attach":
            model = sharded_model([(64, 96)])
            optimizer_of(model, sketch_size=16).attach(model)
        elif case == "shape":
            one, two = Shapes([(64, 96)]), sharded_model([(64, 32)])
            optimizer = optimizer_of(one)
            train(one, optimizer, range(1))
            optimizer_of(two).load_state_dict(optimizer.state_dict())
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def step_of(param, gradient):
    param.grad = gradient
    SGC([param], min_size=0).step()


def replicated():
    """Train a DTensor that every rank holds whole: no sums over ranks, the same as a plain tensor."""
    start = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    slope = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    mesh = init_device_mesh("cpu", (WORLD,))
    param, plain = nn.Parameter(distribute_tensor(start, mesh, [Replicate()])), nn.Parameter(start.clone())
    step_of(param, distribute_tensor(slope, mesh, [Replicate()]))
    step_of(plain, slope)
    return gap([param.detach().to_local()], [plain.detach()])


# ------------------------------------------------------------------------------- jobs through accelerate and Trainer


def begin_accelerate():
    """Let accelerate take up FSDP on this CPU, as `fsdp_on_cpu.py` does for a whole script."""
    os.environ.update(LOCAL_RANK=os.environ["RANK"], LOCAL_WORLD_SIZE=str(WORLD))
    pretend()


def plugin_of(kind):
    from accelerate import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", state_dict_type=kind, cpu_ram_efficient_loading=False
    )


def accelerated(kind, **options):
    """Prepare a model and its optimizer, made before the model is sharded."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin_of(kind))
    assert accelerator.is_fsdp2
    model = Shapes(EVERYWHERE)
    return accelerator, *accelerator.prepare(model, optimizer_of(model, **options))


def accelerate_resume(folder, kind, **options):
    """Train six steps with accelerate; three, save_state, load_state into what is fresh, three. Compare the bits."""
    begin_accelerate()
    rank = dist.get_rank()
    _, whole, whole_optimizer = accelerated(kind, **options)
    train(whole, whole_optimizer, range(6), rank)
    accelerator, first, first_optimizer = accelerated(kind, **options)
    train(first, first_optimizer, range(3), rank)
    accelerator.save_state(folder)
    again, second, second_optimizer = accelerated(kind, **options)
    again.load_state(folder)
    train(second, second_optimizer, range(3, 6), rank)
    return same_bits((whole, whole_optimizer.optimizer), (second, second_optimizer.optimizer))


def trainer_resume(folder, kind, **options):
    """Train six steps with the Trainer; resume from the checkpoint of the third. Compare the bits."""
    begin_accelerate()
    from sgc.hf import find_sgc

    runs, warned = [], []
    logging.getLogger("sgc").addFilter(lambda record: warned.append(record.getMessage()) is None)
    for checkpoint in (None, "checkpoint-3"):
        trainer = trainer_of(folder, kind, options)
        trainer.train(resume_from_checkpoint=checkpoint and str(Path(folder) / checkpoint))
        runs.append((trainer.model, find_sgc(trainer.optimizer), trainer))
    (whole, whole_optimizer, trainer), (resumed, resumed_optimizer, _) = runs
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "same bits": same_bits((whole, whole_optimizer), (resumed, resumed_optimizer)),
        "losses": losses,
        "warned": warned,
    }


def trainer_of(folder, kind, options):
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

    from sgc.hf import SGCCallback, SGCFactory

    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=101, max_position_embeddings=16, **sizes))
    rows = torch.randint(101, (48, 12), generator=torch.Generator().manual_seed(0)).sort(1).values
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        fsdp="full_shard",
        fsdp_config={"version": 2, "state_dict_type": kind, "cpu_ram_efficient_loading": False},
    )
    kwargs = {"lr": 1e-2, "chunk_size": 32, "min_size": 10, **options}
    return Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        optimizer_cls_and_kwargs=(SGCFactory, kwargs),
        callbacks=[SGCCallback()],
    )

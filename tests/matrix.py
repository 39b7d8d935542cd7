"""One small model, trained in every harness the same way: what tests/test_matrix.py runs in two processes."""

import contextlib
import gc
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from sgc import SGC

WIDTH, BATCH, LR = 64, 8, 3e-3


class Small(nn.Module):
    """Three matrices, a norm and biases."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 96)
        self.norm = nn.LayerNorm(96)
        self.across = nn.Linear(96, 96, bias=False)
        self.down = nn.Linear(96, WIDTH)

    def forward(self, x):
        return self.down(torch.tanh(self.across(self.norm(torch.tanh(self.up(x))))))


def options_of(rule, eps):
    sketched = {"sketch_size": 16, "sparsity": 2, "moments": rule}
    return {"lr": LR, "min_size": 256, "chunk_size": 64, "eps": eps, **({} if rule == "memoryless" else sketched)}


class Plain:
    """A loop of one's own, in one process (each of the two does the same)."""

    attach = False

    def __init__(self, dtype, rule, micro_batches, max_norm, eps=1e-8):
        torch.manual_seed(0)
        self.module, self.max_norm, self.micro_batches = Small().to(dtype), max_norm, micro_batches
        self.dtype = dtype
        self.make(options_of(rule, eps))

    def make(self, options):
        self.optimizer = SGC(self.module.parameters(), **options)
        self.optimizer.check_ranks = self.shard[1] > 1  # else every process trains a model of its own
        if self.attach:
            self.optimizer.attach(self.module, sample_every=2)
        self.model = self.wrap()

    def wrap(self):
        return self.module

    @property
    def shard(self):
        return 0, 1

    def batch(self, number):
        generator = torch.Generator().manual_seed(number % 3)  # three batches, to be learnt by heart
        x = torch.randn(BATCH * self.micro_batches, WIDTH, generator=generator).to(self.dtype)
        rank, ranks = self.shard
        return [part.chunk(ranks)[rank] for part in x.chunk(self.micro_batches)]

    def syncing(self, last):
        return contextlib.nullcontext()

    def backward(self, loss):
        loss.backward()

    def loss_of(self, x):
        return (self.model(x) - x.flip(1)).float().square().mean()

    def step(self, number, poison=False):
        handle = None
        if poison and dist.get_rank() == dist.get_world_size() - 1 - (self.shard[1] == 1):
            handle = self.poisoned().register_hook(lambda gradient: gradient * math.nan)
        losses = []
        for at, x in enumerate(self.batch(number)):
            with self.syncing(at == self.micro_batches - 1):
                loss = self.loss_of(x)
                self.backward(loss / self.micro_batches)
                losses.append(loss.item())
        norm = self.update()
        if handle is not None:
            handle.remove()
        return sum(losses) / len(losses), norm

    def poisoned(self):
        return self.module.across.weight

    def update(self):
        norm = None
        if self.max_norm:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
            norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def weights(self):
        full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in self.module.parameters()]
        return torch.cat([p.detach().float().flatten() for p in full])

    def save(self, folder):
        if dist.get_rank() == 0:
            torch.save([self.module.state_dict(), self.optimizer.state_dict()], Path(folder) / "state.pt")
        dist.barrier()

    def load(self, folder):
        weights, state = torch.load(Path(folder) / "state.pt", weights_only=True)
        self.module.load_state_dict(weights)
        self.optimizer.load_state_dict(state)

    def close(self):
        pass


class Attached(Plain):
    """The same with compressed gradients."""

    attach = True


class Ddp(Plain):
    """DistributedDataParallel, each rank with half of every batch."""

    def wrap(self):
        return nn.parallel.DistributedDataParallel(self.module)

    @property
    def shard(self):
        return dist.get_rank(), dist.get_world_size()

    def syncing(self, last):
        return contextlib.nullcontext() if last else self.model.no_sync()


class DdpAttached(Ddp):
    """Ranks sum compressed gradients."""

    attach = True


class Fsdp2(Ddp):
    """fully_shard, checkpoints by torch.distributed.checkpoint."""

    def make(self, options):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer, self.model = SGC(self.module.parameters(), **options), self.module

    def syncing(self, last):
        self.module.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def save(self, folder):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict

        weights, state = get_state_dict(self.module, self.optimizer)
        dcp.save({"weights": weights, "state": state}, checkpoint_id=folder)

    def load(self, folder):
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        weights, state = get_state_dict(self.module, self.optimizer)
        dcp.load({"weights": weights, "state": state}, checkpoint_id=folder)
        set_state_dict(self.module, self.optimizer, model_state_dict=weights, optim_state_dict=state)


class Zero(Ddp):
    """DeepSpeed, which owns accumulation, clipping and checkpoints."""

    stage = 1

    def make(self, options):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first, for minutes
        self.optimizer = SGC(self.module.parameters(), **options)
        settings = {
            "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
            "gradient_accumulation_steps": self.micro_batches,
            "gradient_clipping": self.max_norm or 0.0,
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 100},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.dtype is torch.bfloat16},
            "steps_per_print": 10**9,
        }
        self.model, *_ = deepspeed.initialize(model=self.module, optimizer=self.optimizer, config=settings)

    def syncing(self, last):
        return contextlib.nullcontext()

    def step(self, number, poison=False):
        handle = None
        if poison and dist.get_rank() == 1:
            handle = self.poisoned().register_hook(lambda gradient: gradient * math.nan)
        losses = []
        for x in self.batch(number):
            loss = self.loss_of(x)
            self.model.backward(loss)
            losses.append(loss.item())
            self.model.step()
        if handle is not None:
            handle.remove()
        return sum(losses) / len(losses), float(self.model.get_global_grad_norm() or 0.0) if self.max_norm else None

    def weights(self):
        import deepspeed

        params = list(self.module.parameters())
        gathered = deepspeed.zero.GatheredParameters(params) if self.stage == 3 else contextlib.nullcontext()
        with gathered:
            return torch.cat([param.detach().float().flatten() for param in params])

    def save(self, folder):
        self.model.save_checkpoint(folder)

    def load(self, folder):
        self.model.load_checkpoint(folder)

    def close(self):
        self.model.destroy()


class Zero2(Zero):
    """ZeRO-2."""

    stage = 2


class Zero3(Zero):
    """ZeRO-3."""

    stage = 3


HARNESSES = {
    "one process": Plain,
    "one process, compressed gradients": Attached,
    "DDP": Ddp,
    "DDP, compressed gradients": DdpAttached,
    "FSDP2": Fsdp2,
    "ZeRO-1": Zero,
    "ZeRO-2": Zero2,
    "ZeRO-3": Zero3,
}


def same_on_all_ranks(tensor):
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor.contiguous())
    return all(torch.equal(tensor, other) for other in others)


@contextlib.contextmanager
def running(case, micro_batches=1, max_norm=None, eps=1e-8):
    run = HARNESSES[case["harness"]](case["dtype"], case["rule"], micro_batches, max_norm, eps)
    try:
        yield run
    finally:
        run.close()
        gc.collect()


def trains(case, folder):
    """The loss falls, on the same weights on every rank."""
    with running(case) as run:
        losses = [run.step(number)[0] for number in range(30)]
        assert losses[-1] < 0.95 * losses[0], losses
        assert same_on_all_ranks(run.weights())


def accumulates_and_clips(case, folder):
    """Two micro-batches, a schedule and a bound on the norm: norms, and where sums are exact weights, of one process.

    eps is as large as a gradient, so that an update notices how long its gradient is.
    """
    found = {}
    for name in ("one process", case["harness"]):
        with running({**case, "harness": name}, micro_batches=2, max_norm=0.05, eps=1e-2) as run:
            start = run.weights()
            schedule = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda t: min(1.0, (t + 1) / 3))
            norms = []
            for number in range(4):
                norms.append(run.step(number)[1])
                schedule.step()
            weights = run.weights()
            assert run.shard[1] == 1 or same_on_all_ranks(weights)
            assert run.shard[1] == 1 or same_on_all_ranks(torch.tensor(norms))
            found[name] = torch.tensor(norms), weights - start
    (expected, change), (norms, changed) = found["one process"], found[case["harness"]]
    compressed = "compressed" in case["harness"]
    loose = case["dtype"] is torch.bfloat16 or compressed
    torch.testing.assert_close(norms[:1], expected[:1], rtol=0.2 if compressed else 0.03 if loose else 1e-4, atol=0)
    if not loose and case["rule"] == "memoryless":
        torch.testing.assert_close(changed, change, rtol=0, atol=1e-3 * change.abs().max().item())
    length = (changed.norm() / change.norm()).item()
    if compressed:
        low, high = 0.2, 5.0  # each micro-batch has chosen its own entries
    elif case["dtype"] is torch.bfloat16:
        low, high = 0.5, 2.0  # DeepSpeed keeps fp32 weights, whose bf16 copies round small changes away
    else:
        low, high = 0.9, 1.1
    assert low < length < high, length


def resumes(case, folder):
    """A run that is saved, loaded and gone on with ends in the bits of one that was not."""
    with running(case) as run:
        for number in range(4):
            run.step(number)
            if number == 1:
                run.save(folder)
        expected = run.weights()
    with running(case) as run:
        run.load(folder)
        for number in range(2, 4):
            run.step(number)
        assert torch.equal(run.weights(), expected)


def skips(case, folder):
    """A NaN in one layer of one rank: nobody's weights take it up, all ranks stay alike, and training goes on."""
    with running(case) as run:
        losses = [run.step(number, poison=number == 2)[0] for number in range(30)]
        weights = run.weights()
        assert weights.isfinite().all()
        assert run.shard[1] == 1 or same_on_all_ranks(weights)
        assert losses[-1] < 0.97 * losses[0], losses


FEATURES = {
    "trains": trains,
    "accumulation, clipping, schedule": accumulates_and_clips,
    "resume, bit-equal": resumes,
    "NaN on one rank": skips,
}


def check(case, folder):
    """Do what one cell of the matrix says."""
    FEATURES[case["feature"]](case, folder)

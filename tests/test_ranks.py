"""Two processes: the same weights after any number of steps, sketches on the wire, and one opinion."""

import copy
import gc
import inspect
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sgc import SGC
from sgc.arguments import IGNORED, SWITCHED_OFF
from sgc.backward import sums
from sgc.backward.gradient import CompressedGradient
from sgc.moments import RULES
from sgc.parallel import ranks
from sgc.state import state_schema
from tests.processes import Processes

SKETCHED = {"lr": 3e-3, "chunk_size": 64, "sketch_size": 16, "min_size": 64}


@pytest.fixture(scope="module")
def processes():
    pool = Processes(2)
    yield pool
    pool.close()


class Routed(torch.nn.Module):
    """Two experts, of which a batch may use one: the other gets no gradient on that rank."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(32, 48)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(48, 48) for _ in range(3))
        self.last = torch.nn.Linear(48, 32)

    def forward(self, x, expert):
        return self.last(torch.tanh(self.experts[expert](torch.tanh(self.first(x)))))


def weights(model):
    return torch.cat([param.detach().flatten().float() for param in model.parameters()])


def same_on_all_ranks(tensor):
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor)
    return all(torch.equal(tensor, other) for other in others)


def train(attach, steps, micro_batches=1, dtype=torch.float32, experts=(0, 0), max_norm=1.0, **kwargs):
    rank = dist.get_rank()
    torch.manual_seed(rank)  # the ranks start apart, DistributedDataParallel brings them together
    model = Routed().to(dtype)
    optimizer = SGC(model.parameters(), **{**SKETCHED, **kwargs})
    if attach:
        optimizer.attach(model)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    norms, losses = [], []
    for step in range(steps):
        generator = torch.Generator().manual_seed(2 * (step % 3) + rank)  # to be learnt by heart
        for number in range(micro_batches):
            x = torch.randn(8, 32, generator=generator).to(dtype)
            ddp.require_backward_grad_sync = number == micro_batches - 1
            loss = (ddp(x, experts[rank]) - x.flip(1)).float().square().mean() / micro_batches
            loss.backward()
            losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(ddp.parameters(), max_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, norms, losses


def check_identical(attach, steps, rule, dtype, micro_batches):
    model, _, norms, losses = train(attach, steps, micro_batches, dtype, moments=rule)
    assert same_on_all_ranks(weights(model))
    assert same_on_all_ranks(torch.tensor(norms))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("attach", "dtype"), [(True, torch.float32), (True, torch.bfloat16), (False, torch.bfloat16)])
def test_ranks_stay_bit_identical(processes, rule, attach, dtype):
    steps = 100 if rule == "residual" and attach else 20
    processes.run(check_identical, attach, steps, rule, dtype, 1)


def alone(ddp):
    torch.manual_seed(0)
    model = Routed()
    optimizer = SGC(model.parameters(), **SKETCHED).attach(model)
    forward = DistributedDataParallel(model, find_unused_parameters=True) if ddp else model
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(8, 32, generator=generator)
        (forward(x, 0) - x.flip(1)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(forward.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def test_one_rank_alone_trains_as_a_process_without_ranks():
    pool = Processes(1)
    try:
        (under_ddp,), (unwrapped,) = pool.run(alone, True), pool.run(alone, False)
    finally:
        pool.close()
    for trained in (under_ddp, unwrapped):
        torch.testing.assert_close(trained, alone(False), rtol=0, atol=1e-6)


def test_ranks_stay_bit_identical_with_accumulation(processes):
    processes.run(check_identical, True, 20, "residual", torch.float32, 3)


def check_unused_expert():
    model, optimizer, norms, _ = train(True, 5, experts=(0, 1), weight_decay=0.1)
    assert same_on_all_ranks(weights(model))
    assert same_on_all_ranks(torch.tensor(norms))
    steps = [int(optimizer.state[expert.weight].get("step", torch.tensor(0))) for expert in model.experts]
    assert steps == [5, 5, 0]  # the third expert, that nobody used, has not even decayed
    unused = model.experts[2].weight.detach().clone()
    torch.manual_seed(0)
    assert torch.equal(unused, Routed().experts[2].weight)


def test_a_parameter_used_on_one_rank_is_updated_on_all_and_one_that_nobody_used_on_none(processes):
    processes.run(check_unused_expert)


def started(attach):
    torch.manual_seed(0)
    model = Routed()
    optimizer = SGC(model.parameters(), **SKETCHED)
    if attach:
        optimizer.attach(model)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    return model, optimizer, ddp


def first_norm(attach, same_data):
    rank = dist.get_rank()
    _, _, ddp = started(attach)
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0 if same_data else rank))
    (ddp(x, 0) - x.flip(1)).square().mean().backward()
    return torch.nn.utils.clip_grad_norm_(ddp.parameters(), math.inf).item()


def test_the_norm_is_that_of_the_mean_gradient(processes):
    assert processes.run(first_norm, True, True) == pytest.approx(processes.run(first_norm, False, True), rel=1e-5)
    assert processes.run(first_norm, True, False) == pytest.approx(processes.run(first_norm, False, False), rel=0.1)


def bytes_on_the_wire():
    model, optimizer, *_ = train(True, 4)
    sent = optimizer.stats()["reduced_bytes"]
    schemas = [state_schema(param.shape, optimizer.param_groups[0]) for param in model.parameters()]
    sizes = [{name: math.prod(shape) for name, (shape, _) in schema.items()} for schema in schemas]
    compressed = [size for size in sizes if "sketch" in size]
    statistics = sum(size["row"] + size["col"] + 3 for size in compressed)
    assert sent == 4 * (sum(size["sketch"] for size in compressed) + statistics)
    entries = [param.numel() for param, size in zip(model.parameters(), sizes, strict=True) if "sketch" in size]
    widths = [32, 48, 48, 48, 48]  # n of each: a row, as rows have fewer than chunk_size entries
    expected = [count * 16 / n for count, n in zip(entries, widths, strict=True)]  # n/k times fewer
    assert [size["sketch"] for size in compressed] == expected


def test_ranks_send_sketches_and_the_statistic_and_nothing_else(processes):
    processes.run(bytes_on_the_wire)


def skip_counts(attach):
    rank = dist.get_rank()
    model, optimizer, ddp = started(attach)
    if rank == 1:
        model.first.weight.register_hook(lambda gradient: gradient * math.nan)
    before = weights(model), model.first.weight.detach().clone()
    x = torch.randn(8, 32)
    (ddp(x, 0) - x).square().mean().backward()
    optimizer.step()
    assert torch.equal(model.first.weight, before[1])
    assert not torch.equal(weights(model), before[0])
    assert same_on_all_ranks(weights(model))
    return optimizer.stats()["skipped_tensors"]


@pytest.mark.parametrize("attach", [True, False])
def test_a_nan_on_one_rank_skips_the_same_tensor_on_every_rank(processes, attach):
    assert processes.run(skip_counts, attach) == [1, 1]


def refusal_of(act):
    """Give what a rank says when it refuses."""
    try:
        act()
    except RuntimeError as error:
        return str(error)
    return None


def disagree(how):
    """Make the first step with what is this rank's."""
    rank = dist.get_rank()
    kwargs, shapes, attach, groups, frozen = (
        how.get(name, (default, default))[rank]
        for name, default in (("kwargs", {}), ("shapes", 64), ("attach", None), ("groups", 1), ("frozen", 0))
    )
    model = torch.nn.Sequential(torch.nn.Linear(64, shapes), torch.nn.Linear(shapes, 64))
    for param in list(model.parameters())[:frozen]:
        param.requires_grad_(False)
    params = [{"params": list(model.parameters())[number::groups]} for number in range(groups)]
    optimizer = SGC(params, **{**SKETCHED, "sketch_size": 0 if attach else 16, **kwargs})
    forward = model
    if attach:
        optimizer.attach(model, sample_every=attach)
        forward = DistributedDataParallel(model)

    def step():
        forward(torch.ones(1, 64)).sum().backward()
        optimizer.step()

    said = refusal_of(step)
    assert refusal_of(step) == said  # who goes on all the same is refused again
    return said


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ({"kwargs": ({"lr": 1e-3}, {"lr": 2e-3})}, "lr=0.001 on rank 0, lr=0.002 on rank 1 (parameter group 0)"),
        ({"kwargs": ({"lr": torch.tensor(0.5)}, {"lr": torch.tensor(0.25)})}, "lr=0.5 on rank 0, lr=0.25 on rank 1"),
        ({"shapes": (64, 32)}, "parameter 0 [64, 64] torch.float32 trained on rank 0, 0 [32, 64]"),
        ({"frozen": (0, 1)}, "torch.float32 trained on rank 0, 0 [64, 64] torch.float32 frozen on rank 1"),
        ({"groups": (1, 2)}, "1 parameter groups on rank 0, 2 on rank 1"),
        ({"attach": (8, 4)}, "sample_every=8 on rank 0, sample_every=4 on rank 1"),
        ({"kwargs": ({"seed": 0}, {"seed": 1}), "attach": (8, 8)}, "seed=0 on rank 0, seed=1 on rank 1"),
    ],
    ids=["lr", "lr as a tensor", "shapes", "frozen", "groups", "sample_every", "attached"],
)
def test_ranks_that_disagree_are_all_refused_before_the_first_update_with_one_sentence(processes, how, sentence):
    first, second = processes.run(disagree, how)
    assert first == second
    assert sentence in first


TWO_VALUES = {  # of every argument of SGC that admits two and changes what is computed
    "lr": (1e-3, torch.tensor(2e-3)),
    "betas": ((0.9, 0.999), (0.9, 0.99)),
    "eps": (1e-8, 1e-6),
    "weight_decay": (0.0, 0.1),
    "chunk_size": (64, None),
    "sketch_size": (16, 0),
    "sparsity": (2, 4),
    "recovered": (2, 4),
    "moments": ("residual", "whitened"),
    "recovery": ("omp", "gomp"),
    "scale": (1.0, 2.0),
    "rank": (4, 2),
    "refresh_every": (10, 20),
    "min_size": (64, 128),
    "state_dtype": (torch.float32, torch.bfloat16),
    "stochastic_rounding": (True, False),
    "maximize": (False, True),
    "seed": (0, 1),
}


@pytest.mark.parametrize("name", sorted(set(inspect.signature(SGC).parameters) - {"params", *IGNORED, *SWITCHED_OFF}))
def test_every_argument_of_sgc_must_agree(name):
    def word(rank, value):
        model = torch.nn.Linear(64, 64)
        optimizer = SGC(model.named_parameters(), **{**SKETCHED, name: value})
        return ranks.as_json(rank, ranks.must_agree(optimizer))

    one, other = TWO_VALUES[name]
    assert ranks.difference(word(1, one), word(0, one)) is None
    assert f"{name}=" in ranks.difference(word(1, other), word(0, one))


def late_or_gone(kind):
    """Rank 1 comes late, or makes no SGC and comes when all is over; meanwhile rank 0 waits."""
    ranks.BEAT, ranks.SILENCE, ranks.FAREWELL = 0.1, 1.0, 1.0
    try:
        rank, model = dist.get_rank(), torch.nn.Linear(64, 64)
        dist.barrier()
        if rank == 1 and kind == "gone":
            time.sleep(3)
        optimizer = SGC(model.parameters())
        if rank == 1 and kind == "late":
            time.sleep(3)
        said = refusal_of(optimizer.step)
        assert (optimizer._presence is None) == (said is None)
        dist.barrier()
        return said
    finally:
        ranks.BEAT, ranks.SILENCE, ranks.FAREWELL = 3.0, 30.0, 5.0


def test_a_rank_that_is_late_is_waited_for_and_one_that_shows_no_sign_of_life_is_not(processes):
    assert processes.run(late_or_gone, "late") == [None, None]
    first, second = processes.run(late_or_gone, "gone")
    assert first == second
    assert first.startswith("rank 1 has shown no sign of life for 1 s")
    assert "`optimizer.check_ranks = False`" in first


def step_alone(check):
    """Rank 0 steps, and rank 1 never does."""
    group = dist.new_group([0])
    optimizer = SGC(torch.nn.Linear(64, 64).parameters())
    optimizer.check_ranks = group if check == "group" else False
    start = time.monotonic()
    if dist.get_rank() == 0:
        optimizer.step()
    return time.monotonic() - start


@pytest.mark.parametrize("check", ["group", "none"])
def test_a_rank_waits_for_those_alone_that_it_is_to_agree_with(processes, check):
    assert max(processes.run(step_alone, check)) < 1


DIES = """
import datetime, os, sys, torch
from sgc import SGC
from sgc.parallel import ranks
torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(hours=1))
optimizer = SGC(torch.nn.Linear(64, 64).parameters())
torch.distributed.barrier()
if os.environ["RANK"] == "1":
    optimizer.load_state_dict({"state": {}, "param_groups": []})
optimizer.step()
"""


def test_the_reason_of_a_rank_that_dies_before_its_first_step_reaches_the_others_whatever_the_timeout():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = str(Path(__file__).resolve().parents[1])
    common = {**os.environ, "PYTHONPATH": root, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen([sys.executable, "-c", DIES], env={**common, "RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    said = [process.communicate(timeout=60)[1].strip().splitlines()[-1] for process in started]
    reason = said[1].removeprefix("[rank1]: ")
    assert reason.startswith("ValueError: ")
    assert f"rank 1 has ended before its first step: {reason}" in said[0]


def single():
    """The only matrix is left to DistributedDataParallel, so that nothing is compressed."""
    model = torch.nn.Linear(64, 64, bias=False)
    optimizer = SGC(model.parameters(), min_size=64).attach(model)
    DistributedDataParallel(model)(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    assert same_on_all_ranks(weights(model))


def test_a_model_of_one_tensor_trains_attached(processes):
    processes.run(single)


def group_timeout():
    *_, optimizer, _, _ = train(True, 1)
    return ranks.timeout_of(optimizer._compressor._ranks.group), ranks.timeout_of()


def test_the_group_that_sums_compressed_gradients_has_the_timeout_of_the_run(processes):
    for own, run in processes.run(group_timeout):
        assert own == run
        assert run.total_seconds() == 60  # of tests/processes.py


def attach_too_late():
    model = Routed()
    optimizer = SGC(model.parameters(), **SKETCHED)
    with pytest.raises(RuntimeError, match="before the model is wrapped"):
        optimizer.attach(DistributedDataParallel(model))
    late = SGC(model.parameters(), **SKETCHED)
    late.attach(model)
    outer = torch.nn.Sequential(model)
    ddp = DistributedDataParallel(outer)  # it was not told which parameters of the outer module to ignore
    with pytest.raises(RuntimeError, match="very module"):
        late._compressor._ranks.join(ddp)


def test_attaching_too_late_or_to_another_module_is_refused(processes):
    processes.run(attach_too_late)


def all_compressed():
    model = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False), torch.nn.Linear(32, 64, bias=False))
    optimizer = SGC(model.parameters(), **SKETCHED)
    optimizer.attach(model)
    ddp = DistributedDataParallel(model)
    ddp(torch.randn(4, 32)).square().sum().backward()
    assert not isinstance(model[0].weight.grad, CompressedGradient)  # the smaller stays with DistributedDataParallel
    assert isinstance(model[1].weight.grad, CompressedGradient)
    optimizer.step()
    assert same_on_all_ranks(weights(model))


def test_a_model_of_compressed_tensors_alone_leaves_one_to_ddp(processes):
    processes.run(all_compressed)


def order_of_events():
    bound, sums.BUCKET_ENTRIES = sums.BUCKET_ENTRIES, 1  # a bucket for every tensor
    try:
        model = Routed()
        optimizer = SGC(model.parameters(), **SKETCHED)
        optimizer.attach(model)
    finally:
        sums.BUCKET_ENTRIES = bound
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    compressor, events = optimizer._compressor, []
    encode, send = compressor._encode, compressor._ranks._send
    compressor._encode = lambda *args: (events.append("encode"), encode(*args))
    compressor._ranks._send = lambda bucket: (events.append("send") if not bucket.sent else None, send(bucket))
    (ddp(torch.randn(4, 32), 0)).square().sum().backward()
    return events


def test_what_is_complete_is_sent_while_backward_goes_on(processes):
    for events in processes.run(order_of_events):
        assert events.count("encode") == 3  # two experts were not used
        assert events.index("send") < len(events) - 1 - events[::-1].index("encode")


def none_on_one_rank():
    """One rank's batch reaches no compressed parameter at all."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"dense": torch.nn.Linear(4, 1), "compressed": torch.nn.Linear(64, 64)})
    model.forward = lambda x, both: model["dense"](x).sum() + (model["compressed"](x.mean() + X).sum() if both else 0)
    optimizer = SGC(model.parameters(), **SKETCHED)
    optimizer.attach(model)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    norms = []
    for number in range(3):
        ddp(torch.randn(2, 4, generator=torch.Generator().manual_seed(number)), rank == 0).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(ddp.parameters(), 0.1).item())
        optimizer.step()
        optimizer.zero_grad()
    assert same_on_all_ranks(torch.tensor(norms))
    assert same_on_all_ranks(weights(model))


X = torch.randn(64, generator=torch.Generator().manual_seed(0))


def test_a_rank_whose_batch_reaches_no_compressed_parameter_keeps_step(processes):
    processes.run(none_on_one_rank)


def whole_again():
    """DistributedDataParallel ignores nothing once the optimizer is detached, dropped, or its model copied."""
    rank = dist.get_rank()
    for how in ("detached", "dropped", "copied"):
        torch.manual_seed(0)
        model = Routed()
        optimizer = SGC(model.parameters(), **SKETCHED)
        optimizer.attach(model)
        if how == "detached":
            optimizer.detach()
        elif how == "dropped":
            optimizer = SGC(model.parameters(), **SKETCHED)
        else:
            model = copy.deepcopy(model)
            optimizer = SGC(model.parameters(), **SKETCHED)
        gc.collect()
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
        for number in range(2):
            ddp(torch.randn(4, 32, generator=torch.Generator().manual_seed(2 * number + rank)), 0).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert same_on_all_ranks(weights(model)), how


def test_what_ddp_was_told_is_taken_back(processes):
    processes.run(whole_again)


def resumed_in_the_middle():
    """Two micro-batches are summed, saved, loaded, and gone on with: as without the break, but for their whitening."""
    rank = dist.get_rank()

    def start():
        torch.manual_seed(0)
        model = Routed()
        optimizer = SGC(model.parameters(), **{**SKETCHED, "sketch_size": 0})
        optimizer.attach(model, sample_every=2)
        return model, optimizer, DistributedDataParallel(model, find_unused_parameters=True)

    def backward(ddp, number, last):
        ddp.require_backward_grad_sync = last
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2 * number + rank))
        (ddp(x, 0) - x.flip(1)).square().mean().backward()

    model, optimizer, ddp = start()
    backward(ddp, 0, False)
    backward(ddp, 1, True)
    sums = model.first.weight.grad
    torch.linalg.vector_norm(sums)
    expected = sums.sums().p.clone()

    model, optimizer, ddp = start()
    backward(ddp, 0, False)
    state = optimizer.state_dict()  # on every rank
    model, optimizer, ddp = start()
    optimizer.load_state_dict(state)
    backward(ddp, 1, True)
    sums = model.first.weight.grad
    torch.linalg.vector_norm(sums)
    assert sums.sums().number == 4
    torch.testing.assert_close(sums.sums().p, expected)


def test_resume_in_the_middle_of_an_accumulation_counts_every_gradient_once(processes):
    processes.run(resumed_in_the_middle)


def refused():
    model = Routed()
    optimizer = SGC(model.parameters(), **SKETCHED)
    optimizer.attach(model)
    model(torch.randn(2, 32), 0).sum().backward()  # not through DistributedDataParallel
    with pytest.raises(RuntimeError, match="not called through DistributedDataParallel"):
        optimizer.step()
    model.zero_grad()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    ddp(torch.randn(2, 32), 0).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="ignores the compressed parameters"):
        optimizer.detach()
    with pytest.raises(RuntimeError, match="leave out join"), ddp.join():
        ddp(torch.randn(2, 32), 0)


def test_what_would_train_ranks_apart_is_refused(processes):
    processes.run(refused)

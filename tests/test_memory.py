import gc
import itertools
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sgc import SGC, Codec
from sgc.budget import budget_ladder
from sgc.codec.layout import matrix_shape
from sgc.planner.trace import Tracker
from sgc.state import state_schema
from sgc.whiten import gradient_norm

RULES = ("residual", "whitened", "sketched", "subspace")
SHAPES = [(64, 96), (33, 77), (40, 6), (9000,), (12, 3, 5, 5), (7,), (), (0, 4), (2, 2000)]
BASE = {"chunk_size": 32, "sketch_size": 24, "sparsity": 4, "min_size": 64, "recovery": "threshold"}
VARIANTS = {
    "fp32": {},
    "bf16": {"state_dtype": torch.bfloat16},
    "int8": {"state_dtype": "int8"},
    "low rank": {"rank": 3},
    "low rank, bf16": {"rank": 3, "state_dtype": "bfloat16"},
    "sketch of the chunk": {"sketch_size": 4096},
    "one chunk": {"chunk_size": None, "sketch_size": 100},
    "all dense": {"min_size": 10**6},
}


def stepped(rule, steps=1, shapes=SHAPES, **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    if options.get("rank"):
        params = [p for p in params if p.dim() < 2 or min(matrix_shape(tuple(p.shape))) not in (2,)]
    optimizer = SGC(params, **{**BASE, "moments": rule, **options})
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return optimizer


def tensors_held(root, without):
    """Every tensor reachable from an object, found by the garbage collector's own links."""
    found, seen, queue = {}, set(), [root]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or id(thing) in without or isinstance(thing, type) or callable(thing):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found[id(thing)] = thing
        elif isinstance(thing, dict):
            queue += [*thing.keys(), *thing.values()]
        elif isinstance(thing, (list, tuple, set)):
            queue += list(thing)
        elif type(thing).__module__.startswith("sgc"):
            queue += [vars(thing)] if hasattr(thing, "__dict__") else gc.get_referents(thing)
    return list(found.values())


def bytes_of(tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("rule", RULES)
def test_state_bytes_are_the_bytes_of_all_tensors_the_optimizer_holds(rule, options):
    if options.get("state_dtype") == "int8":
        pytest.importorskip("bitsandbytes")
    for steps in (0, 1, 2):
        optimizer = stepped(rule, steps, **options)
        params = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert optimizer.state_bytes() == bytes_of(tensors_held(vars(optimizer), params))


def test_the_supports_kept_for_the_statistics_are_counted():
    optimizer = stepped("residual", 10)
    params = {id(p) for group in optimizer.param_groups for p in group["params"]}
    held = bytes_of(tensors_held(vars(optimizer), params))
    assert optimizer.state_bytes() == held
    assert held > optimizer.expected_state_bytes()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("rule", RULES)
def test_the_bytes_are_known_before_the_first_step(rule, options):
    if options.get("state_dtype") == "int8":
        pytest.importorskip("bitsandbytes")
    expected = stepped(rule, 0, **options).expected_state_bytes()
    optimizer = stepped(rule, 2, **options)  # the second step is the first that keeps no probes
    probes = sum(t.numel() * t.element_size() for t in optimizer._loop.probes.tensors())
    assert optimizer.state_bytes() - probes == expected
    assert optimizer.expected_state_bytes() == expected


def test_groups_that_share_a_projection_count_it_once():
    params = [torch.nn.Parameter(torch.randn(8, 64)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:2], "lr": 1.0}, {"params": params[2:], "sketch_size": 16}]
    optimizer = SGC(groups, **BASE)
    for p in params:
        p.grad = torch.randn(8, 64)
    optimizer.step()
    optimizer.step()
    probes = sum(t.numel() * t.element_size() for t in optimizer._loop.probes.tensors())
    assert optimizer.state_bytes() - probes == optimizer.expected_state_bytes()
    assert len(optimizer._loop.projections) == 2


@pytest.mark.parametrize("rule", RULES)
def test_the_schema_names_all_that_is_held_with_shape_and_dtype(rule):
    for options in ({}, {"rank": 3}, {"state_dtype": "bfloat16"}):
        optimizer = stepped(rule, 1, **options)
        for group in optimizer.param_groups:
            for p in group["params"]:
                schema = state_schema(p.shape, group)
                held = optimizer.state[p]
                assert {name: (tuple(t.shape), t.dtype) for name, t in held.items()} == schema


def test_a_memoryless_state_is_rows_and_columns_and_the_count():
    optimizer = stepped("residual", 1, shapes=[(64, 96)], sketch_size=0)
    assert set(optimizer.state[optimizer.param_groups[0]["params"][0]]) == {"step", "row", "col"}
    assert optimizer.expected_state_bytes() == 4 * (64 + 96 + 1)


def test_the_ladder_of_a_budget_goes_down_and_keeps_what_is_fixed():
    rungs = list(budget_ladder({}))
    numbers = [rung["sketch_size"] / rung.get("chunk_size", math.inf) for rung in rungs]
    assert numbers == sorted(numbers, reverse=True)
    assert rungs[-1]["sketch_size"] == 0
    for fixed in ({"chunk_size": 64}, {"sketch_size": 16}, {"sparsity": 2, "chunk_size": 8}):
        rungs = list(budget_ladder(fixed))
        assert not any(name in rung for rung, name in itertools.product(rungs, fixed))
        assert len({tuple(rung.items()) for rung in rungs}) == len(rungs)


def test_a_codec_and_an_optimizer_cut_a_tensor_alike():
    optimizer = stepped("subspace", 1, shapes=[(33, 77)])
    (state,) = optimizer.state.values()
    assert state["sketch"].flatten(0, -2).shape == Codec(32, 24, 4).encode(torch.zeros(33, 77)).shape
    assert math.prod(state["sketch"].shape) < 33 * 77


@pytest.mark.parametrize("options", [{}, {"sketch_size": 8}, {"sketch_size": 8, "attach": True}])
def test_a_step_on_bf16_weights_holds_no_copy_of_the_tensor(options):
    options = dict(options)
    attach = options.pop("attach", False)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.randn(2048, 2048).bfloat16())
    optimizer = SGC(module.parameters(), **options)
    if attach:
        optimizer.attach(module)
    for _ in range(2):
        module.weight.grad = torch.randn(2048, 2048).bfloat16()
        tracker = Tracker()
        for tensor in (module.weight, module.weight.grad, *optimizer.state[module.weight].values()):
            tracker.mark(tensor, "weights")
        with tracker:
            optimizer.step()
        module.weight.grad = None
    assert tracker.peak().temporaries < 4 * module.weight.numel() * 0.6  # of a copy in fp32; blocks are a sixteenth


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 1000, 5_000_000])
def test_the_norm_of_a_gradient_is_that_of_its_numbers(dtype, size):
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = torch.linalg.vector_norm(gradient.double()).item()
    assert gradient_norm(gradient).item() == pytest.approx(exact, rel=1e-3)  # torch sums fp32 plainly
    strided = gradient[:1000:2]
    assert gradient_norm(strided).item() == pytest.approx(torch.linalg.vector_norm(strided.double()).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_a_16_bit_gradient_copies_a_block_at_a_time(dtype):
    with FakeTensorMode():  # shows the copy that a CPU makes inside the operator
        gradient, tracker = torch.empty(50_000_000, dtype=dtype), Tracker()
        tracker.mark(gradient, "gradients")
        with torch.no_grad(), tracker:
            gradient_norm(gradient)
    assert 0 < tracker.peak().temporaries < 4 * gradient.numel() / 10


def test_a_norm_that_overflows_is_infinite_and_one_of_nan_is_nan():
    large = torch.full((5_000_000,), 3e38, dtype=torch.bfloat16)
    assert gradient_norm(large).isinf()
    large[-1] = math.nan
    assert gradient_norm(large).isnan()

"""Whole steps of the optimizer with a sketch, by kernels and by torch."""

import warnings

import pytest
import torch

pytest.importorskip("triton")

from sgc import SGC, backends, batches, step
from sgc.backends.triton import batch, stages
from tests.tolerances import EPS_BF16, MARGIN, TWIN

STEPS = 4
# eps is of the size of the gradients' roots, so that few values are clipped, or all but ±1, and tie.
OPTIONS = {
    "lr": 0.03,
    "betas": (0.8, 0.95),
    "eps": 0.05,
    "weight_decay": 0.1,
    "chunk_size": 32,
    "sketch_size": 24,
    "sparsity": 4,
    "min_size": 0,
    "seed": 3,
    "stochastic_rounding": False,
}
STAGES = ("encode", "select", "recover", "apply_sparse", "square_sums")
SPOILED = {1: float("nan"), 3: float("inf")}  # the first entry of the gradient of these steps; that of step 2 is zero
SHAPES = {
    "several chunks a row": (12, 96),
    "padded rows": (10, 77),
    "short rows share a chunk": (41, 8),
    "vector, ragged": (250,),
    "experts": (3, 5, 64),
}


def steps(
    path, shape, dtype, device, monkeypatch, data=0, count=STEPS,
    attach=False, seen=False, spoiled=False, batched=True, **changed,
):  # fmt: skip
    """Train on given gradients: weights after every step, the state, what took its kernel, and how clear choices were.

    That is the least gap between the last correlation that recovery took and the next, as a share of the largest. Not
    `batched`, tensors are updated one by one, as parts of sharded ones are.
    """
    monkeypatch.setenv(backends.VARIABLE, path)
    taken, gaps = set(), [1.0]
    recover = step.recover

    def measured(target, layout, projection, last, *method, **take):
        if projection.sketch_size < layout.chunk:
            size = projection.correlate(target, layout.chunk).abs().sort(1, descending=True).values
            gap = (size[:, last - 1] - size[:, last]) / size[:, 0]
            gaps.append(gap.nan_to_num(1).min().item())
        return recover(target, layout, projection, last, *method, **take)

    monkeypatch.setattr(step, "recover", measured)
    if not batched:
        monkeypatch.setattr(batches, "_moves_in_place", lambda view: False)
    monkeypatch.setattr(batch, "move_sparsely", noting(batch.move_sparsely, "batch", taken))
    for stage in STAGES:
        monkeypatch.setattr(stages, stage, noting(getattr(stages, stage), stage, taken))
    generator = torch.Generator().manual_seed(data)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(device, dtype))
    optimizer = SGC(layer.parameters(), **{**OPTIONS, **changed})
    if attach:
        optimizer.attach(layer)
    weights = []
    for turn in range(count):
        g = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
        if seen:
            g[[row for row in range(len(g)) if row % STEPS != turn]] = 0
        if spoiled and turn in SPOILED:
            g.view(-1)[0] = SPOILED[turn]
        if spoiled and turn == 2:
            g.zero_()
        (layer.weight * g.to(device, dtype)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        weights.append(layer.weight.detach().clone())
    monkeypatch.undo()
    stats = {name: value for name, value in optimizer.stats().items() if name != "state_bytes"}
    return weights, optimizer.state[layer.weight], stats, taken, min(gaps)


def noting(stage, name, taken):
    def noted(*args, **kwargs):
        made = stage(*args, **kwargs)
        if made is not NotImplemented:
            taken.add(name)
        return made

    return noted


def check(shape, device, monkeypatch, expected, dtype=torch.float32, **changed):
    """Compare on the first data on which nothing all but ties."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SGC: ")  # stages that have no kernel for it
        for data in range(20):
            by_torch, state, stats, none, gap = steps("torch", shape, dtype, device, monkeypatch, data, **changed)
            if gap > MARGIN:
                break
        by_kernels, same, same_stats, taken, _ = steps("triton", shape, dtype, device, monkeypatch, data, **changed)
    assert gap > MARGIN, "no data with clear choices"
    assert not none
    assert taken == set(expected.split())
    unit = TWIN if dtype is torch.float32 else EPS_BF16
    for want, got in zip(by_torch, by_kernels, strict=True):
        assert (got - want).abs().max() <= unit * want.abs().max()
    assert (got == want).float().mean() > (0.1 if dtype is torch.float32 else 0.9)
    for name, want in state.items():
        assert (same[name] - want).abs().max() <= (0 if name == "step" else TWIN) * want.abs().max(), name
    for name in ("grad_norm", "skipped_tensors", "recovery_error", "recovered_fraction", "support_overlap"):
        assert same_stats[name] == pytest.approx(stats[name], rel=TWIN, abs=TWIN, nan_ok=True), name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_batch_makes_the_steps_of_torch(shape, device, monkeypatch):
    check(shape, device, monkeypatch, "batch")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rule", ["residual", "whitened"])
def test_kernels_make_the_steps_of_torch_where_the_gradient_is_whitened(rule, shape, device, monkeypatch):
    check(shape, device, monkeypatch, "square_sums encode recover apply_sparse", moments=rule, batched=False)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rule", ["subspace", "sketched"])
def test_kernels_make_the_steps_of_torch_where_it_is_not(rule, shape, device, monkeypatch):
    check(shape, device, monkeypatch, "encode recover apply_sparse", moments=rule)


def test_kernels_make_the_steps_of_torch_on_bf16(device, monkeypatch):
    check((12, 96), device, monkeypatch, "batch", dtype=torch.bfloat16)


def test_kernels_make_the_steps_of_torch_where_rows_have_no_gradient(device, monkeypatch):
    """With a larger eps than elsewhere: a row that is seen for the first time is large, and would be clipped."""
    check((12, 96), device, monkeypatch, "batch", seen=True, eps=1.0)
    expected = "square_sums encode recover apply_sparse"
    check((12, 96), device, monkeypatch, expected, seen=True, eps=1.0, batched=False)


@pytest.mark.parametrize("sketch_size", [24, 0])
def test_gradients_that_are_not_finite_or_all_zero_move_what_they_move_in_torch(sketch_size, device, monkeypatch):
    check((12, 96), device, monkeypatch, "batch", spoiled=True, count=6, sketch_size=sketch_size)


@pytest.mark.parametrize("spoiled", [0, 1])
def test_a_gradient_that_is_not_finite_stops_no_other_tensor(spoiled, device, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "triton")
    params = [torch.nn.Parameter(torch.ones(12, 96, device=device)) for _ in range(2)]
    optimizer = SGC(params, **OPTIONS)
    for param in params:
        param.grad = torch.randn(12, 96, device=device)
    params[spoiled].grad[3, 5] = float("nan")
    optimizer.step()
    assert torch.equal(params[spoiled], torch.ones(12, 96, device=device))
    assert not torch.equal(params[1 - spoiled], torch.ones(12, 96, device=device))
    assert optimizer.stats()["skipped_tensors"] == 1
    assert not optimizer.state[params[spoiled]]
    assert optimizer.state[params[1 - spoiled]]["sketch"].any()


def test_kernels_make_the_steps_of_torch_without_weight_decay(device, monkeypatch):
    check((12, 96), device, monkeypatch, "batch", weight_decay=0.0)


def test_kernels_make_the_steps_of_torch_on_sketches_in_bf16(device, monkeypatch):
    """Both round with the same random numbers, but a last bit may decide which way: so one step."""
    expected = "square_sums encode recover apply_sparse"
    check((12, 96), device, monkeypatch, expected, count=1, state_dtype=torch.bfloat16)


def test_kernels_make_the_steps_of_torch_without_a_sketch(device, monkeypatch):
    check((12, 96), device, monkeypatch, "batch", sketch_size=0)
    check((12, 96), device, monkeypatch, "batch", sketch_size=0, recovered=2)
    check((12, 96), device, monkeypatch, "square_sums select apply_sparse", sketch_size=0, batched=False)


def test_kernels_make_the_steps_of_torch_with_compressed_gradients(device, monkeypatch):
    expected = "square_sums encode recover apply_sparse"
    check((12, 96), device, monkeypatch, expected, attach=True)


def test_recovery_in_several_passes_takes_torch_and_the_rest_its_kernels(device, monkeypatch):
    check((12, 96), device, monkeypatch, "square_sums encode apply_sparse", recovery="omp")


def test_a_chunk_no_longer_than_its_sketch_takes_torch(device, monkeypatch):
    check((12, 96), device, monkeypatch, "square_sums apply_sparse", sketch_size=48, sparsity=4)


def test_says_once_why_a_stage_takes_torch(device, monkeypatch):
    monkeypatch.setenv(backends.VARIABLE, "triton")
    backends._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="recover takes the plain torch path.*omp"):
        steps("triton", (12, 96), torch.float32, device, monkeypatch, recovery="omp")
    steps("triton", (12, 96), torch.float32, device, monkeypatch, recovery="omp")

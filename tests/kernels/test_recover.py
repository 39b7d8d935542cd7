"""The kernels of decode beside their twins in plain torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from sgc.apply import apply_entries
from sgc.backends.triton import recover as kernel
from sgc.backends.triton import scatter
from sgc.codec.layout import make_layout
from sgc.codec.project import Projection
from sgc.codec.recover import pursue
from sgc.constants import RIDGE
from sgc.step import Recovered
from tests.kernels.sketch_cases import SHAPES
from tests.tolerances import CORRELATION, EPS, EPS_BF16, SIGMAS, SUM

pytestmark = pytest.mark.usefixtures("twins_in_torch")


def sketches_of(layout, sketch_size, seed, device):
    """Random sketches, the second and the last of them zero."""
    y = torch.randn(layout.chunks, sketch_size, generator=torch.Generator().manual_seed(seed))
    if len(y) > 3:
        y[1] = y[-1] = 0
    return y.to(device)


def check(shape, chunk_size, sketch_size, recovered, device, seed=0, take=True):
    """Compare support, values and rest with float64; whether there was anything to compare."""
    layout, projection = make_layout(shape, chunk_size), Projection(sketch_size, seed=seed)
    if kernel.obstacle(layout, projection, recovered, "threshold") is not None or recovered > sketch_size:
        return False
    y = sketches_of(layout, sketch_size, seed, device)
    left = y.clone()
    index, value = kernel.recover(left, layout, projection, recovered, take=take)
    assert ((index >= 0) & (index < layout.chunk)).all()
    assert (index.diff(dim=1) > 0).all(), "ascending, no two alike"

    columns = projection.columns(layout.chunk, device).double()
    length = layout.lengths(device)
    length = torch.full((layout.chunks,), layout.chunk, device=device) if length is None else length
    real = index < length[:, None]
    assert (real.sum(1) == length.clamp(max=recovered)).all(), "padding only where nothing else is left"
    size = (y.double() @ columns.T).abs()
    size[torch.arange(layout.chunk, device=device) >= length[:, None]] = -1
    norm = y.double().norm(dim=1, keepdim=True)
    least = torch.where(real, size.gather(1, index), math.inf).amin(1, keepdim=True)
    others = size.scatter(1, index, -1).amax(1, keepdim=True)
    assert (least >= others - SUM * norm).all(), "the largest correlations"

    picked = columns[index] * real[:, :, None]
    gram = picked @ picked.mT
    ridge = RIDGE if recovered > 1 else 0.0
    system = gram + (ridge + (~real).double())[:, :, None] * torch.eye(recovered, device=device, dtype=torch.float64)
    right = torch.einsum("ck,csk->cs", y.double(), picked)
    expected = torch.linalg.solve(system, right)
    assert (value[~real] == 0).all()
    condition = torch.linalg.cond(system)[:, None]
    limit = SUM * condition * expected.norm(dim=1, keepdim=True)
    assert ((value - expected).abs() <= limit).all(), ((value - expected).abs() / limit).nan_to_num().max()
    if take:
        rest = y.double() - torch.einsum("cs,csk->ck", value.double(), picked)
        assert ((left - rest).abs() <= SUM * norm).all()
        assert (left.double().norm(dim=1, keepdim=True) <= norm * (1 + SUM)).all(), "a projection is never longer"
    else:
        assert torch.equal(left, y)
    return True


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_recovers_what_float64_does_on_every_shape(shape, device):
    assert check(shape, 64, 24, 5, device)
    assert check(shape, 64, 24, 1, device)
    assert check(shape, 64, 24, 3, device, take=False)


@pytest.mark.parametrize("recovered", [1, 2, 3, 8, 24])
@pytest.mark.parametrize("sketch_size", [24, 33, 96])
def test_recovers_what_float64_does_at_every_size(recovered, sketch_size, device):
    assert check((6, 256), 128, sketch_size, recovered, device)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 12),
    cols=st.integers(1, 90),
    chunk_size=st.integers(8, 80),
    sketch_size=st.integers(1, 70),
    recovered=st.integers(1, 32),
    seed=st.integers(0, 99),
)
def test_recovers_what_float64_does_on_any_size(rows, cols, chunk_size, sketch_size, recovered, seed, device):
    check((rows, cols), chunk_size, sketch_size, recovered, device, seed)


@pytest.mark.parametrize(
    ("chunk_size", "sketch_size", "recovered"), [(256, 32, 4), (1024, 128, 16), (1024, 32, 4), (2048, 64, 8)]
)
def test_recovers_what_float64_does_at_the_sizes_in_use(chunk_size, sketch_size, recovered, device, real_sizes):
    rows = 3000 if real_sizes else 3
    assert check((rows, 2048), chunk_size, sketch_size, recovered, device)


@pytest.mark.parametrize("sketch_size", [1, 2, 3])
def test_equal_columns_share_what_they_explain(sketch_size, device):
    """With 2ᵏ ≤ 8 different columns every support has some twice, or with the other sign."""
    assert check((9, 64), 64, sketch_size, sketch_size, device)


def test_agrees_with_torch_where_no_two_correlations_tie(device):
    layout, projection = make_layout((16, 128), 128), Projection(48, seed=2)
    y = sketches_of(layout, 48, 3, device)
    index, value = pursue(y, 128, projection, 4, "threshold")
    got_index, got_value = kernel.recover(y, layout, projection, 4)
    busy = y.any(1)
    assert torch.equal(got_index[busy], index[busy])
    assert (got_value - value)[busy].abs().max() <= SUM * value.abs().max()


def test_correlations_are_as_accurate_as_those_of_fp32(device):
    """A single value recovered is the correlation itself."""
    layout, projection = make_layout((400, 64), 64), Projection(24, seed=2)
    y = sketches_of(layout, 24, 5, device)
    index, value = kernel.recover(y, layout, projection, 1)
    expected = (y.double() @ projection.columns(64, device).double().T).gather(1, index)
    assert ((value - expected).abs() <= CORRELATION * y.double().norm(dim=1, keepdim=True)).all()


def test_of_a_sketch_of_zeros_the_first_entries_are_recovered_as_zeros(device):
    layout, projection = make_layout((4, 64), 64), Projection(24, seed=2)
    index, value = kernel.recover(torch.zeros(4, 24, device=device), layout, projection, 5)
    assert index.tolist() == [[0, 1, 2, 3, 4]] * 4
    assert not value.any()


def test_brings_back_what_was_encoded(device):
    layout, projection = make_layout((20, 256), 256), Projection(128, seed=2)
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(256, generator=generator)[:3].sort().values for _ in range(20)]).to(device)
    value = torch.randn(20, 3, generator=generator).sign().to(device)
    y = projection.project(index, value, 256)
    got_index, got_value = kernel.recover(y, layout, projection, 3, take=True)
    assert torch.equal(got_index, index)
    assert (got_value - value).abs().max() < 2 * RIDGE
    assert y.abs().max() < 2 * RIDGE


@pytest.mark.parametrize(
    ("chunk_size", "sketch_size", "recovered", "method", "reason"),
    [
        (64, 24, 4, "omp", "omp"),
        (64, 64, 4, "threshold", "sketch_size=64"),
        (4096, 64, 4, "threshold", "4096 entries"),
        (64, 48, 33, "threshold", "recovered=33"),
    ],
)
def test_says_what_it_can_not_do(chunk_size, sketch_size, recovered, method, reason):
    layout = make_layout((16, 4096), chunk_size)
    assert reason in kernel.obstacle(layout, Projection(sketch_size, 0), recovered, method)


# ---- the weights -----------------------------------------------------------------------------------------------------


def update_of(layout, count, device, seed=0):
    """An update whose supports hold padding, and are spread over the chunks."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(layout.chunk, generator=generator)[:count] for _ in range(layout.chunks)])
    value = torch.randn(index.shape, generator=generator)
    return Recovered(index.sort(1).values.to(device), value.to(device), None)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_moves_the_weights_that_torch_moves(shape, dtype, decay, device):
    layout = make_layout(shape, 64)
    update = update_of(layout, min(5, layout.chunk), device)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device=device, dtype=dtype)
    expected = weight.clone()
    apply_entries(expected, *layout.entries(update.index, update.value), 0.3, decay, None)
    before = weight.clone()
    scatter.apply(weight, layout, update.index, update.value, 0.3, decay, None)
    unit = {torch.float32: 2 * EPS, torch.bfloat16: EPS_BF16, torch.float16: 2.0**-10}[dtype]
    assert ((weight - expected).abs() <= unit * expected.abs().clamp(min=1)).all()
    assert (weight == expected).float().mean() > 0.9, "rounded another way where fp32 lies between two numbers only"
    if not decay:
        moved = torch.zeros(layout.numel, dtype=torch.bool, device=device)
        moved[layout.entries(update.index, update.value)[0]] = True
        assert torch.equal(weight.view(-1)[~moved], before.view(-1)[~moved])


@pytest.mark.parametrize("decay", [0.0, 2.0**-10])
def test_rounds_at_random_to_the_mean(decay, device):
    """A move of a quarter of a unit shows in a quarter of the weights, and another seed in others."""
    layout = make_layout((256, 16), 16)
    index = torch.arange(16, device=device).repeat(256, 1)
    lr = EPS_BF16 / 4
    value = torch.ones(256, 16, device=device) * (1 if not decay else 1 - decay / lr)
    moved = []
    for seed in (1, 2, 1 << 40):
        weight = torch.full((256, 16), 1.5, dtype=torch.bfloat16, device=device)
        scatter.apply(weight, layout, index, value, lr, decay, seed)
        change = (1.5 - weight.float()) / EPS_BF16
        assert set(change.unique().tolist()) == {0.0, 1.0}
        target = (decay * 1.5 + lr * value[0, 0].item()) / EPS_BF16
        deviation = SIGMAS * math.sqrt(target * (1 - target) / change.numel())
        assert abs(change.mean().item() - target) < deviation
        assert abs(change[0].mean().item() - target) < 0.5, "within a chunk, too"
        moved.append(change)
    assert not torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])


def test_what_decays_is_rounded_at_random_too(device):
    layout = make_layout((64, 256), 256)
    weight = torch.ones(64, 256, dtype=torch.bfloat16, device=device)
    nothing = Recovered(torch.zeros(64, 1, dtype=torch.int64, device=device), torch.zeros(64, 1, device=device), None)
    scatter.apply(weight, layout, nothing.index, nothing.value, 1.0, 2.0**-10, 5)
    share = (weight < 1).float().mean().item()
    target = 2.0**-10 / (EPS_BF16 / 2)  # below 1 the unit is half as large
    assert abs(share - target) < SIGMAS * math.sqrt(target * (1 - target) / weight.numel())

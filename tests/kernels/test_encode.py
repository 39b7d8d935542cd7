"""The kernel of encode beside its twins in plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from sgc.backends.triton import encode as kernel
from sgc.codec.encode import Whitening, encode, select
from sgc.codec.layout import make_layout
from sgc.codec.project import Projection
from sgc.constants import CLIP
from sgc.moments import ema
from sgc.whiten import mean_squares, whiten
from tests.kernels.sketch_cases import SHAPES
from tests.tolerances import SUM

pytestmark = pytest.mark.usefixtures("twins_in_torch")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradient_of(shape, dtype, seed, device, levels=None):
    """Heavy-tailed, or with few `levels`, so that many tie; the second row and the last one are zero."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    if levels:
        g = torch.randint(-levels, levels + 1, shape, generator=generator) / 7
    if g.dim() > 1 and len(g) > 3:
        g[1] = g[-1] = 0
    return g.to(device=device, dtype=dtype)


def whitening_of(grid, layout, eps):
    state = {"row": torch.zeros(layout.rows, device=grid.device), "col": torch.zeros(layout.cols, device=grid.device)}
    return whiten(state, *mean_squares(grid, layout), 0.99, eps, 1)


def check(shape, dtype, chunk_size, sketch_size, sparsity, device, whitens=True, levels=None, seed=0, eps=1e-3):
    """Compare choices, values and sketches; whether there was anything to compare."""
    layout, projection = make_layout(shape, chunk_size), Projection(sketch_size, seed=5)
    grid = layout.grid(gradient_of(shape, dtype, seed, device, levels))
    if kernel.obstacle(layout, dtype, sparsity, projection) is not None:
        return False
    whitening = whitening_of(grid, layout, eps) if whitens and grid.any() else None
    expected, factors = select(grid, layout, whitening, sparsity), whitening and whitening[:3]
    index, value = kernel.select(grid, layout, factors, sparsity, eps)
    assert torch.equal(index, expected[0])
    assert torch.equal(value, expected[1])

    p, q = encode(grid, layout, projection, sparsity, whitening, squares=True)
    got_p, got_q = kernel.encode(grid, layout, factors, projection, sparsity, eps, squares=True)
    assert_close(got_p, p, expected[1])
    assert_close(got_q, q, expected[1].square())
    return True


def assert_close(got, expected, value):
    """Two orders of the sum of s products v/√k."""
    size = value.abs().amax(1, keepdim=True)
    assert ((got - expected).abs() <= SUM * size).all(), ((got - expected).abs() / size).nan_to_num().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("whiten", [False, True])
def test_agrees_with_torch_on_every_shape_and_dtype(shape, dtype, whiten, device):
    assert check(shape, dtype, 64, 24, 5, device, whiten)


@pytest.mark.parametrize("sparsity", [1, 3, 17])
@pytest.mark.parametrize("chunk_size", [48, 128])
def test_agrees_with_torch_where_entries_tie(chunk_size, sparsity, device):
    for levels in (1, 3):
        for whitens in (False, True):
            assert check((3, 192), torch.bfloat16, chunk_size, 33, sparsity, device, whitens, levels)


def test_entries_that_whitening_makes_all_but_equal_are_told_apart(device):
    """w is within a few units of 2 everywhere, so a quotient that is rounded another way would choose other entries."""
    layout, generator = make_layout((40, 128), 128), torch.Generator().manual_seed(0)
    a, b = (torch.rand(size, generator=generator).to(device) + 0.5 for size in (40, 128))
    grid = (torch.outer(a, b) + 1e-3) * 2
    units = torch.randint(-3, 4, grid.shape, generator=generator, dtype=torch.int32).to(device)
    grid = (grid.view(torch.int32) + units).view(torch.float32)
    whitening = Whitening(a, b, None, 1e-3, CLIP)
    index, value = select(grid, layout, whitening, 5)
    assert (value.amax() - value.amin()) < 1e-5
    got_index, got_value = kernel.select(grid, layout, whitening[:3], 5, 1e-3)
    assert torch.equal(got_index, index)
    assert torch.equal(got_value, value)


def test_rows_whose_squares_vanish_are_left_out(device):
    layout = make_layout((4, 64), 64)
    grid = gradient_of((4, 64), torch.float32, 0, device)
    grid[2] = 1e-25
    whitening = whitening_of(grid, layout, 0.0)
    index, value = kernel.select(grid, layout, whitening[:3], 5, 0.0)
    expected = select(grid, layout, whitening, 5)
    assert torch.equal(index, expected[0])
    assert torch.equal(value, expected[1])
    assert not value[2].any()


@settings(max_examples=15)
@given(
    rows=st.integers(1, 12),
    cols=st.integers(1, 90),
    chunk_size=st.integers(8, 80),
    sketch_size=st.integers(1, 70),
    sparsity=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    whiten=st.booleans(),
    levels=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 99),
)
def test_agrees_with_torch_on_any_size(
    rows, cols, chunk_size, sketch_size, sparsity, dtype, whiten, levels, seed, device
):
    check((rows, cols), dtype, chunk_size, sketch_size, sparsity, device, whiten, levels, seed)


@pytest.mark.parametrize(("chunk_size", "sketch_size", "sparsity"), [(256, 32, 4), (1024, 128, 16), (4096, 32, 4)])
def test_agrees_with_torch_at_the_sizes_in_use(chunk_size, sketch_size, sparsity, device, real_sizes):
    rows = 3000 if real_sizes else 1
    assert check((rows, 4096), torch.bfloat16, chunk_size, sketch_size, sparsity, device)


@pytest.mark.parametrize("rule", ["residual", "ema"])
def test_moves_the_moment_in_the_same_pass(rule, device):
    layout, projection = make_layout((9, 96), 48), Projection(20, seed=1)
    grid = gradient_of((9, 96), torch.float32, 0, device)
    whitening = whitening_of(grid, layout, 1e-8)
    p, _ = encode(grid, layout, projection, 4, whitening)
    moment = torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(device)
    expected = moment.clone()
    if rule == "residual":
        expected.mul_(0.9).add_(p)
    else:
        ema(expected, p, 0.9)
    got, _ = kernel.encode(
        grid, layout, whitening[:3], projection, 4, 1e-8, into=kernel.Into(moment, 0.9, averages=rule == "ema")
    )
    assert got.data_ptr() == moment.data_ptr()
    assert (got - expected).abs().max() <= SUM * expected.abs().max()


def test_writes_nothing_beyond_its_chunks(device):
    layout, projection = make_layout((5, 77), 32), Projection(20, seed=1)
    grid = gradient_of((5, 77), torch.float32, 0, device)
    held = torch.full((layout.chunks + 64, 20), torch.nan, device=device)
    into = kernel.Into(held[: layout.chunks].zero_(), 1.0, averages=False)
    kernel.encode(grid, layout, None, projection, 4, 1e-8, into=into)
    assert held[: layout.chunks].isfinite().all()
    assert held[layout.chunks :].isnan().all()


def test_bits_of_the_matrix_are_its_signs(device):
    for sketch_size in (1, 20, 32, 45, 128):
        projection = Projection(sketch_size, seed=7)
        words = projection.words(40, device)
        row = torch.arange(sketch_size, device=device)
        bits = (words[row // 32] >> (row % 32)[:, None]) & 1
        assert torch.equal(bits.T == 1, projection.columns(words.shape[1], device) > 0)
        assert projection.words(9, device) is words
        assert projection.words(41, device).shape[1] >= 41


@pytest.mark.parametrize(
    ("dtype", "chunk_size", "sketch_size", "sparsity", "reason"),
    [
        (torch.float64, 64, 24, 4, "float64"),
        (torch.float32, 8192, 24, 4, "8192 entries"),
        (torch.float32, 64, 64, 4, "sketch_size=64"),
        (torch.float32, 64, 24, 64, "sparsity=64"),
        (torch.float32, 512, 24, 65, "sparsity=65"),
    ],
)
def test_says_what_it_can_not_do(dtype, chunk_size, sketch_size, sparsity, reason):
    layout = make_layout((16, 8192), chunk_size)
    assert reason in kernel.obstacle(layout, dtype, sparsity, Projection(sketch_size, 0))

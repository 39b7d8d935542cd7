import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgc import moments, whiten
from sgc.constants import FLOOR
from tests.tolerances import ADAMW, EPS, SUM

BETAS, EPSILON = (0.9, 0.99), 1e-3


def normal(*shape, seed=0):
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape), dtype=torch.float32)


def advance(rule, held, p, q=None, t=1, betas=BETAS, eps=0.0):
    """Move the moments of a rule by a sketch, and return what is to be recovered."""
    rates = moments.Rates(1.0, 0.0, eps, betas, t)
    moments.RULES[rule].move(held, p, q, rates)
    return moments.RULES[rule].target(held, rates)


def zeros(rule):
    return {name: torch.zeros(4, 8) for name in moments.RULES[rule].held}


def test_a_moment_moves_in_place_towards_the_new_value():
    moment, new = normal(3, 5), normal(3, 5, seed=1)
    expected = 0.9 * moment + 0.1 * new
    held = moments.ema(moment, new, 0.9)
    assert held is moment
    assert (moment - expected).abs().max() <= 4 * EPS * 3


def test_the_first_subspace_step_is_the_sign_of_the_sketch():
    p = normal(4, 8)
    y = advance("subspace", zeros("subspace"), p)
    assert (y - p.sign()).abs().max() <= ADAMW


def test_subspace_is_adam_on_the_sketch():
    held = zeros("subspace")
    param = torch.nn.Parameter(torch.zeros(4, 8))
    adam = torch.optim.Adam([param], lr=1.0, betas=BETAS, eps=EPSILON)
    for t in range(1, 8):
        p, before = normal(4, 8, seed=t), param.detach().clone()
        y = advance("subspace", held, p, t=t, eps=EPSILON)
        param.grad = p
        adam.step()
        assert (y - (before - param.detach())).abs().max() <= ADAMW + 8 * EPS


@pytest.mark.parametrize("rule", ["whitened", "sketched", "subspace"])
def test_a_constant_sketch_is_its_own_unbiased_mean_at_every_step(rule):
    p, q = normal(4, 8), normal(4, 8).square()
    held = zeros(rule)
    for t in range(1, 30):
        mean = advance(rule, held, p, q, t)
        if rule == "sketched":
            square = moments.RULES[rule].square(held, moments.Rates(1.0, 0.0, 0.0, BETAS, t))
            assert (square - q).abs().max() <= SUM * float(q.max()) * 8  # 1 − 0.99^t is as small as 1/100
        if rule == "subspace":
            mean = mean * p.abs()
        assert (mean - p).abs().max() <= SUM * float(p.abs().max())


def test_the_residual_keeps_what_is_not_taken_out():
    e = normal(3, 4)
    p, before = normal(3, 4, seed=1), e.clone()
    assert advance("residual", {"sketch": e}, p, betas=(0.75, 0.999)) is e
    assert torch.equal(e, 0.75 * before + p)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32))
def test_the_factored_second_moment_is_exact_for_a_gradient_of_rank_one(rows, cols, seed):
    """√v̂ᵢⱼ = |gᵢⱼ| where g² = r·cᵀ, whatever β2, as long as nothing reaches the floor."""
    rng = np.random.default_rng(seed)
    r, c = (torch.tensor(rng.uniform(0.1, 1, size), dtype=torch.float32) for size in (rows, cols))
    g = torch.outer(r, c)
    row, col = torch.zeros(rows), torch.zeros(cols)
    for t in range(1, 4):
        a, b = whiten.factor(row, col, g.square().mean(1), g.square().mean(0), 0.999, t)
        # 1 − β2^t is computed in float64, the EMA of a fp32 zero adds two roundings: some 2⁻²² · 1/(1 − β2)·EPS is left
        assert (torch.outer(a, b) - g).abs().max() <= SUM * float(g.max())


def test_rows_and_columns_count_for_at_least_the_floor_of_their_mean():
    g = torch.ones(10, 20)
    g[3] = 0
    g[:, 5] = 0
    a, b = whiten.factor(torch.zeros(10), torch.zeros(20), g.square().mean(1), g.square().mean(0), 0.9, 1)
    mean_row, mean_col = float(g.square().mean(1).mean()), float(g.square().mean(0).mean())
    assert float(a[3]) == pytest.approx(math.sqrt(FLOOR), rel=1e-5)
    assert float(b[5]) == pytest.approx(math.sqrt(FLOOR * mean_col), rel=1e-5)
    assert float(a[0]) == pytest.approx(math.sqrt(float(g[0].square().mean()) / mean_row), rel=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-24, 1e-22, 1e-21, 1e-19, 1e-10, 1.0, 1e10, 1e15])
def test_the_second_moment_of_gradients_of_any_size_is_finite(size):
    """Squares of 1e-22 vanish in fp32, and their EMA does sooner."""
    square = torch.full((6,), size).square()
    a, b = whiten.factor(torch.zeros(6), torch.zeros(6), square, square, 0.999, 1)
    assert bool(a.isfinite().all())
    assert bool(b.isfinite().all())


def test_sketched_ratios_are_at_most_one():
    """v̂ is floored at m̂², also where its least squares came out negative."""
    m, v = normal(5, 4), normal(5, 4, seed=1)
    u = moments.sketched_ratio(m, v, v.clamp(min=0).mean(), 0.0)
    assert float(u.abs().max()) <= 1 + SUM
    assert torch.equal(u.sign(), m.sign())


def test_sketched_ratios_are_floored_at_the_mean_of_the_real_entries():
    m, v = torch.tensor([[0.1, 0.1], [0.1, 0.0]]), torch.tensor([[4.0, 0.0], [5.0, 0.0]])
    u = moments.sketched_ratio(m, v, torch.tensor(3.0), 0.0)  # of three real entries
    assert (u - torch.tensor([[0.1 / 2, 0.1 / math.sqrt(3)], [0.1 / math.sqrt(5), 0.0]])).abs().max() <= 4 * EPS


def test_a_given_scale_is_taken_as_it_is():
    group = {"scale": 3, "recovered": 4}
    assert moments.update_scale(1000, 10, 100, group) == 3.0


@pytest.mark.parametrize(("entries", "chunks", "chunk"), [(1000, 10, 100), (65, 2, 64), (1, 1, 1)])
@pytest.mark.parametrize(
    ("rule", "sketch_size", "recovered", "scale"),
    [
        ("residual", 0, None, moments.UNAVERAGED),
        ("whitened", 0, None, moments.UNAVERAGED),
        ("residual", 100, 100, moments.UNAVERAGED),
        ("whitened", 100, 100, 1.0),
        ("sketched", 100, 100, 1.0),
        ("subspace", 100, 100, 1.0),
    ],
)
def test_where_every_entry_moves_the_default_scale_is_one_with_momentum_and_less_without(
    entries, chunks, chunk, rule, sketch_size, recovered, scale
):
    group = {"scale": None, "recovered": recovered, "moments": rule, "sketch_size": sketch_size}
    assert moments.update_scale(entries, chunks, chunk, group) == scale

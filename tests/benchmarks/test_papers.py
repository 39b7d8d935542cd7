"""Optimizers written from papers: each is held to a limit in which it is something known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import papers
from benchmarks.peers import head_parameters, make
from tests import tiny

SHAPES = [(6, 10), (10, 6), (7, 7), (1, 5), (5, 1)]
# fp32 sums in another order: a few times 2**-24 relative to moves of lr per step
SAME = {"rtol": 1e-5, "atol": 1e-6}


def pair(shape, ours, theirs, steps=8):
    """Give parameters trained by two optimizers on the same gradients."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [build([param]) for build, param in zip((ours, theirs), params, strict=True)]
    for _ in range(steps):
        grad = torch.randn(shape, generator=generator)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    return params, optimizers


def own(params):
    return [{"params": params, "own": True}]


@pytest.mark.parametrize("shape", SHAPES)
def test_frugal_at_density_1_is_adamw(shape):
    params, _ = pair(
        shape,
        lambda p: papers.FRUGAL(own(p), 1e-2, weight_decay=0.1, density=1.0, update_gap=3),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    )
    torch.testing.assert_close(*params, **SAME)


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_frugal_refuses_what_is_no_density(density):
    with pytest.raises(ValueError, match=rf"density must be in \(0, 1\], got {density}"):
        papers.FRUGAL([torch.nn.Parameter(torch.zeros(2, 2))], 1e-2, density=density)


def test_frugal_moves_drawn_columns_as_adam_and_the_others_by_their_sign():
    optimizer = papers.FRUGAL(own([param := torch.nn.Parameter(torch.zeros(4, 8))]), 1.0, density=0.25, update_gap=2)
    drawn = []
    for step in range(4):
        param.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        before = param.detach().clone()
        optimizer.step()
        columns = optimizer.state[param]["columns"].tolist()
        others = [i for i in range(8) if i not in columns]
        assert torch.equal((before - param)[:, others], param.grad.sign()[:, others])
        if step % 2 == 0:  # new moments: Adam's first direction is the sign
            torch.testing.assert_close((before - param)[:, columns], param.grad.sign()[:, columns])
        else:
            assert not torch.equal((before - param)[:, columns], param.grad.sign()[:, columns])
        drawn.append(columns)
    assert drawn[0] == drawn[1] != drawn[2] == drawn[3]


@pytest.mark.parametrize("shape", SHAPES)
def test_ldadam_at_full_rank_is_adam(shape):
    params, optimizers = pair(
        shape,
        lambda p: papers.LDAdam(own(p), 1e-2, rank=max(shape)),
        lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.908, 0.99)),
    )
    torch.testing.assert_close(*params, **SAME)
    (state,) = optimizers[0].state.values()
    assert state["error"].abs().max() < 1e-5  # nothing is left out


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_ldadam_keeps_what_its_subspace_leaves_out(shape):
    """Gradient and turned momentum are divided into what the subspace holds and what is kept for the next step."""
    param = torch.nn.Parameter(torch.zeros(shape))
    optimizer = papers.LDAdam(own([param]), 1e-2, rank=2)
    beta1 = 0.908
    error, momentum = torch.zeros(6, 10), torch.zeros(6, 10)
    for step in range(4):
        param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        grad = param.grad if shape[0] < shape[1] else param.grad.T
        optimizer.step()
        state = optimizer.state[param]
        basis = state["basis"]
        torch.testing.assert_close(basis.T @ basis, torch.eye(2), rtol=0, atol=1e-5)
        held = basis @ state["exp_avg"]
        # (1 - β1)·error + β1·lost = what of the full momentum is not held, so nothing is ever lost
        full = beta1 * momentum + (1 - beta1) * (grad + error)
        torch.testing.assert_close(held + (1 - beta1) * state["error"], full, rtol=1e-4, atol=1e-5)
        error, momentum = state["error"].clone(), held.clone()
        assert step == 0 or (state["exp_avg_sq"] >= 0).all()


@given(rows=st.integers(2, 12), columns=st.integers(2, 12), seed=st.integers(0, 99), size=st.floats(1e-6, 1e6))
def test_sinkgd_makes_rows_and_columns_of_equal_norms(rows, columns, seed, size):
    # positive entries converge fast, whatever their size; signs change no norm
    generator = torch.Generator().manual_seed(seed)
    grad = (0.5 + torch.rand(rows, columns, generator=generator)) * size
    grad *= torch.randn(rows, columns, generator=generator).sign()
    found = papers.balance(grad, 5)
    torch.testing.assert_close(found.norm(dim=1), torch.full((rows,), math.sqrt(columns)), rtol=1e-3, atol=0)
    torch.testing.assert_close(found.norm(dim=0), torch.full((columns,), math.sqrt(rows)), rtol=1e-5, atol=0)
    assert torch.equal(found.sign(), grad.sign())


def test_scale_holds_momentum_in_the_last_layer_and_no_other():
    made = make("scale", network := tiny.llama(), 1e-2)
    before = tiny.bits(network)
    tiny.loss_of(network).backward()
    made.optimizer.step()
    last = {id(param) for param in head_parameters(network)}
    for name, param in network.named_parameters():
        state, moved = made.optimizer.state[param], (before[name] - param.detach()) / 1e-2
        if param.dim() < 2:
            assert set(state) == {"moments", "exp_avg", "exp_avg_sq"}
            continue
        assert set(state) == ({"exp_avg"} if id(param) in last else set())
        dim = 0 if "embed" in name else 1
        size = moved.square().mean(dim).sqrt()
        reached = param.grad.abs().sum(dim) > 0
        # fp32 weights near 0.1 moved by 1e-2: an error of 1e-8 of 1e-2
        torch.testing.assert_close(size[reached], torch.ones_like(size)[reached], rtol=1e-4, atol=1e-4)


def test_scales_momentum_is_an_average_of_the_last_layers_gradients():
    param = torch.nn.Parameter(torch.zeros(3, 5))
    optimizer = papers.SCALE([{"params": [param], "own": True, "last": True}], 0.1)
    expected = torch.zeros(3, 5)
    for step in range(3):
        param.grad = torch.randn(3, 5, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        expected = 0.9 * expected + 0.1 * param.grad
    torch.testing.assert_close(optimizer.state[param]["exp_avg"], expected)

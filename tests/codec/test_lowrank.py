import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgc.codec.lowrank import leading_basis, turn
from tests.tolerances import SUM, TURN


def matrix_with_spectrum(rows, cols, singular, seed):
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, len(singular))))[0]
    right = np.linalg.qr(rng.standard_normal((cols, len(singular))))[0]
    return torch.tensor(left * singular @ right.T, dtype=torch.float32)


@given(st.integers(1, 40), st.integers(0, 60), st.data())
def test_the_columns_of_a_basis_are_orthonormal(rows, more, data):
    rank = data.draw(st.integers(1, rows))
    matrix = torch.tensor(np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((rows, rows + more)))
    basis = leading_basis(matrix.float(), rank, seed=0)
    assert basis.shape == (rows, rank)
    assert basis.is_contiguous()
    assert (basis.T @ basis - torch.eye(rank)).abs().max() <= SUM


@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize("decay", [0.5, 0.8])
def test_the_basis_spans_the_leading_left_singular_vectors(rank, decay):
    matrix = matrix_with_spectrum(40, 120, decay ** np.arange(40), 0)
    left = torch.linalg.svd(matrix.double(), full_matrices=False).U[:, :rank]
    basis = leading_basis(matrix, rank, seed=1).double()
    # two power iterations shrink what follows the rank + 8 probes by decay^(8·5) at least: below fp32
    assert torch.linalg.svdvals(left.T @ basis).min() >= 1 - 1e-3 * decay


def test_the_basis_loses_hardly_more_than_the_best_one_on_a_flat_spectrum():
    matrix = torch.tensor(np.random.default_rng(0).standard_normal((60, 90)), dtype=torch.float32)
    basis = leading_basis(matrix, 8, seed=0)
    held = float((basis.T @ matrix).square().sum())
    best = float(torch.linalg.svdvals(matrix)[:8].square().sum())
    assert 0.9 * best <= held <= best * (1 + SUM)


def test_the_columns_come_in_the_order_of_the_singular_values():
    matrix = matrix_with_spectrum(30, 50, 0.6 ** np.arange(30), 2)
    sizes = (leading_basis(matrix, 6, seed=0).T @ matrix).norm(dim=1)
    assert torch.allclose(sizes, torch.tensor(0.6 ** np.arange(6), dtype=torch.float32), rtol=1e-3)


def test_a_matrix_of_low_rank_is_spanned_whole():
    matrix = matrix_with_spectrum(30, 50, np.array([3.0, 2.0, 1.0]), 3)
    basis = leading_basis(matrix, 3, seed=0)
    assert (basis @ (basis.T @ matrix) - matrix).abs().max() <= SUM
    assert leading_basis(matrix, 5, seed=0).isfinite().all()


def test_the_same_seed_makes_the_same_bits():
    matrix = torch.tensor(np.random.default_rng(0).standard_normal((20, 30)), dtype=torch.float32)
    assert torch.equal(leading_basis(matrix, 4, seed=5), leading_basis(matrix, 4, seed=5))
    before = torch.get_rng_state()
    leading_basis(matrix, 4, seed=6)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("rank", [1, 4])
def test_turning_is_exact_for_what_lies_in_both_bases(rank, pieces):
    """A state linear in PᵀG: turning it is the same as having held it in the new basis."""
    rng = np.random.default_rng(0)
    old = torch.tensor(np.linalg.qr(rng.standard_normal((20, rank)))[0], dtype=torch.float32)
    mixing = torch.tensor(np.linalg.qr(rng.standard_normal((rank, rank)))[0], dtype=torch.float32)
    new = old @ mixing
    whole = old @ torch.tensor(rng.standard_normal((rank, pieces * 6)), dtype=torch.float32)
    turned = turn((old.T @ whole).view(rank * pieces, 6), old, new)
    assert (turned.view(rank, -1) - new.T @ whole).norm() <= TURN * whole.norm()


@pytest.mark.parametrize("pieces", [1, 3])
def test_turning_projects_what_the_new_basis_does_not_span(pieces):
    rng = np.random.default_rng(1)
    old, new = (torch.tensor(np.linalg.qr(rng.standard_normal((20, 4)))[0], dtype=torch.float32) for _ in range(2))
    held = torch.tensor(rng.standard_normal((4 * pieces, 6)), dtype=torch.float32)
    turned = turn(held, old, new)
    expected = new.T @ (old @ held.view(4, -1))
    assert (turned.view(4, -1) - expected).norm() <= TURN * held.norm()
    assert turned.norm() <= held.norm() * (1 + TURN)


def test_turning_into_the_same_basis_changes_nothing():
    old = torch.eye(9)[:, :3]
    held = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(turn(held, old, old), held)
    assert torch.equal(turn(held.square(), old, old, squared=True), held.square())


def test_turned_squares_stay_positive_and_follow_a_permutation_of_the_basis():
    rng = np.random.default_rng(2)
    old = torch.tensor(np.linalg.qr(rng.standard_normal((20, 3)))[0], dtype=torch.float32)
    squares = torch.tensor(rng.random((6, 5)), dtype=torch.float32)
    order = [2, 0, 1]
    flipped = old[:, order] * torch.tensor([1.0, -1.0, 1.0])
    turned = turn(squares, old, flipped, squared=True).view(3, -1)
    assert (turned - squares.view(3, -1)[order]).abs().max() <= TURN
    other = torch.tensor(np.linalg.qr(rng.standard_normal((20, 3)))[0], dtype=torch.float32)
    assert bool((turn(squares, old, other, squared=True) >= 0).all())

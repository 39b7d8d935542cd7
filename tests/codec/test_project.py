import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgc.codec import project
from sgc.codec.project import MOST_ENTRIES, Projection, check_projection, mix, sign_columns
from tests.tolerances import SIGMAS, SUM, UNIT
from tests.twin import scramble, sign_matrix

# Signs of columns 0, 1, 2, 255 and 100001 as bits, row 0 the lowest. Checkpoints and radio links depend on them: they
# never change.
COLUMNS = [0, 1, 2, 255, 100001]
BITS = {
    (8, 0): [0xE7, 0x78, 0x2B, 0x1D, 0x52],
    (40, 7): [0x2E9FCC2DB5, 0x867F0810D1, 0x83BC6C599E, 0xB51C6B5DED, 0x5C857951A1],
    (64, 2**40 + 5): [
        0xDE479EC9DFF56FF,
        0x610EF6632102CC6D,
        0x2EB9FE9DE6E8D366,
        0x2A8A48A558AE5F23,
        0x62FAA1D73A9361D3,
    ],
}


@pytest.mark.parametrize(("k", "seed"), BITS)
def test_the_bits_of_the_projection_are_these_in_every_release(k, seed):
    signs = sign_columns(torch.tensor(COLUMNS), k, seed) > 0
    assert [sum(2**row for row in range(k) if column[row]) for column in signs.tolist()] == BITS[k, seed]


@pytest.mark.parametrize("seed", [0, 1, 7, 2**32 - 1, 2**32, 2**63 - 1])
@pytest.mark.parametrize("k", [1, 31, 32, 33, 70])
def test_the_projection_is_that_of_the_twin(k, seed):
    made = sign_columns(torch.arange(40), k, seed)
    assert made.dtype == torch.float32
    assert torch.equal(made.double(), torch.tensor(sign_matrix(k, 40, seed)).T.float().double())


@given(st.integers(0, 2**32 - 1))
def test_the_hash_is_the_same_for_numbers_and_tensors(x):
    assert mix(x) == int(mix(torch.tensor([x]))) == scramble(x)


@given(st.integers(1, 300), st.integers(0, 2**63 - 1))
def test_every_column_has_unit_norm_and_entries_of_one_size(k, seed):
    columns = sign_columns(torch.arange(20), k, seed)
    assert torch.equal(columns.abs(), torch.full((20, k), 1 / math.sqrt(k)))
    assert (columns.norm(dim=1) - 1).abs().max() <= UNIT


@given(st.integers(1, 120), st.integers(0, 100), st.integers(1, 60), st.integers(0, 60), st.integers(0, 2**63 - 1))
def test_fewer_columns_or_rows_are_a_prefix_of_more(k, more_rows, n, more_columns, seed):
    small = sign_columns(torch.arange(n), k, seed)
    large = sign_columns(torch.arange(n + more_columns), k + more_rows, seed)
    assert torch.equal(small.sign(), large[:n, :k].sign())


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_signs_are_balanced_and_columns_and_rows_uncorrelated(seed):
    """4.9 standard deviations: chance fails one of these in a million, and there is no chance in a hash."""
    k, n = 96, 2000
    signs = sign_columns(torch.arange(1, n + 1), k, seed).sign().double().numpy()
    assert abs(signs.sum()) <= SIGMAS * math.sqrt(n * k)
    pairs = n * (n - 1) / 2
    gram = signs @ signs.T / math.sqrt(k)  # off the diagonal: mean 0, variance 1, fourth moment 3 − 2/k
    off = gram[np.triu_indices(n, 1)]
    assert abs(off.sum()) <= SIGMAS * math.sqrt(pairs)
    assert abs((off**2).sum() - pairs) <= SIGMAS * math.sqrt(pairs * (2 - 2 / k))
    assert np.abs(off).max() <= math.sqrt(2 * math.log(2 * pairs / 1e-6))  # Hoeffding, union over the pairs
    rows = (signs.T @ signs / math.sqrt(n))[np.triu_indices(k, 1)]
    assert np.abs(rows).max() <= math.sqrt(2 * math.log(k * k / 1e-6))


def test_seeds_give_unrelated_projections():
    n, k = 500, 64
    for other in (1, 2, 2**32, 2**40):
        same = (sign_columns(torch.arange(n), k, 0).sign() * sign_columns(torch.arange(n), k, other).sign()).sum()
        assert abs(float(same)) <= SIGMAS * math.sqrt(n * k)


@given(st.integers(2, 80), st.integers(1, 60), st.integers(1, 5), st.data())
def test_projecting_is_multiplying_with_the_projection(n, k, chunks, data):
    sparsity = data.draw(st.integers(1, n))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    index = torch.tensor(np.stack([rng.permutation(n)[:sparsity] for _ in range(chunks)]))
    value = torch.tensor(rng.standard_normal((chunks, sparsity)), dtype=torch.float32)
    y = Projection(k, 5).project(index, value, n)
    dense = np.zeros((chunks, n))
    np.put_along_axis(dense, index.numpy(), value.double().numpy(), 1)
    expected = dense @ sign_matrix(k, n, 5).T if k < n else dense
    assert y.shape == (chunks, min(k, n))
    assert np.abs(y.double().numpy() - expected).max() <= SUM * max(1.0, np.abs(expected).max())


@given(st.integers(2, 80), st.integers(1, 60), st.integers(0, 2**32))
def test_the_sketch_of_a_sum_is_the_sum_of_the_sketches(n, k, seed):
    rng = np.random.default_rng(seed)
    projection = Projection(k, seed)
    index = [torch.tensor(rng.permutation(n)[None, : rng.integers(1, n + 1)]) for _ in range(3)]
    value = [torch.tensor(rng.standard_normal(i.shape), dtype=torch.float32) for i in index]
    whole = sum(torch.zeros(1, n).scatter_(1, i, v) for i, v in zip(index, value, strict=True))
    of_sum = projection.project(torch.arange(n)[None], whole, n)
    sum_of = sum(projection.project(i, v, n) for i, v in zip(index, value, strict=True))
    assert (of_sum - sum_of).abs().max() <= SUM * max(1.0, float(of_sum.abs().max()))


def test_a_projection_too_large_to_hold_gives_the_same_made_in_blocks(monkeypatch):
    n, k, s = 300, 40, 12
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(n, generator=generator)[:s] for _ in range(4)])
    value = torch.randn(4, s, generator=generator)
    held = Projection(k, 3)
    y, columns, scores = (
        held.project(index, value, n),
        held.gather(index, n),
        held.correlate(held.project(index, value, n), n),
    )
    assert held.bytes() == 4 * n * k
    monkeypatch.setattr(project, "HELD_ENTRIES", 0)
    made = Projection(k, 3)
    assert not made.holds(n)
    assert torch.equal(made.gather(index, n), columns)
    assert (made.project(index, value, n) - y).abs().max() <= SUM * float(y.abs().max())
    assert (made.correlate(y, n) - scores).abs().max() <= SUM * float(scores.abs().max())
    blocks = list(made.column_blocks(n, torch.device("cpu"), entries=7 * k))
    assert [start for start, _ in blocks] == list(range(0, n, 7))
    assert torch.equal(torch.cat([block for _, block in blocks]), held.columns(n, torch.device("cpu")))
    assert made.bytes() == 0


def test_more_entries_than_fit_a_block_are_added_up():
    n, k = 5000, 4096
    projection = Projection(k, 0)
    assert not projection.holds(n)
    index = torch.randperm(n, generator=torch.Generator().manual_seed(0))[None, :600]
    value = torch.randn(1, 600, generator=torch.Generator().manual_seed(1))
    parts = [projection.project(index[:, at : at + 100], value[:, at : at + 100], n) for at in range(0, 600, 100)]
    whole = projection.project(index, value, n)
    assert (whole - sum(parts)).abs().max() <= SUM * float(whole.abs().max())


def test_a_held_projection_grows_and_keeps_its_columns():
    projection = Projection(16, 1)
    few = projection.columns(10, torch.device("cpu")).clone()
    many = projection.columns(50, torch.device("cpu"))
    assert torch.equal(many[:10], few)
    assert torch.equal(projection.columns(10, torch.device("cpu")), few)
    assert projection.bytes() == 4 * 16 * 50


def test_a_projection_of_too_many_entries_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=rf"one chunk of {2**27} entries with sketch_size=64.*{2**33}.*{MOST_ENTRIES}"):
        check_projection(2**27, 64)
    check_projection(2**26, 64)
    check_projection(2**40, 2**40)  # the chunk itself: no projection

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgc.codec.sparsify import top_entries


def expected_top(row, sparsity):
    order = sorted(range(len(row)), key=lambda at: (-abs(row[at]), at))
    return sorted(order[:sparsity])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(n=st.integers(1, 70), chunks=st.integers(1, 6), levels=st.integers(1, 40), data=st.data())
def test_takes_the_largest_magnitudes_and_the_lowest_index_among_equals(dtype, n, chunks, levels, data):
    sparsity = data.draw(st.integers(1, n + 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    x = torch.tensor(rng.integers(-levels, levels + 1, (chunks, n)) / 7, dtype=dtype)
    index, value = top_entries(x, sparsity)
    assert index.dtype == torch.int64
    assert value.dtype == dtype
    assert index.tolist() == [expected_top(row, sparsity) for row in x.tolist()]
    assert torch.equal(value, x.gather(1, index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [1, 2, 16, 100])
def test_of_equal_entries_the_first_are_taken(dtype, sparsity):
    x = torch.ones(3, 1000, dtype=dtype)
    x[1] *= -1
    x[2, ::2] *= -1
    index, _ = top_entries(x, sparsity)
    assert index.tolist() == [list(range(sparsity))] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_are_settled_over_the_whole_range_of_the_dtype(dtype):
    """From subnormal to the largest numbers: the integer key orders as the float does."""
    for size in (torch.finfo(dtype).max, 1e30, 1.0, 1e-30, torch.finfo(dtype).tiny, torch.finfo(dtype).tiny / 16):
        x = torch.full((2, 300), size, dtype=dtype)
        x[1, 200] = 0
        x[1, 7] = 0
        index, _ = top_entries(x, 8)
        assert index.tolist() == [list(range(8)), [0, 1, 2, 3, 4, 5, 6, 8]]


def test_of_zeros_the_first_are_taken_and_signed_zeros_are_equal():
    x = torch.zeros(1, 50)
    x[0, ::2] = -0.0
    assert top_entries(x, 5)[0].tolist() == [[0, 1, 2, 3, 4]]


def test_all_entries_are_kept_in_order_when_as_many_are_wanted():
    x = torch.randn(3, 5)
    for sparsity in (5, 9):
        index, value = top_entries(x, sparsity)
        assert index.tolist() == [[0, 1, 2, 3, 4]] * 3
        assert torch.equal(value, x)


@pytest.mark.parametrize("sparsity", [2, 5])
def test_the_values_are_a_copy(sparsity):
    x = torch.randn(3, 5)
    _, value = top_entries(x, sparsity)
    before = value.clone()
    x.zero_()
    assert torch.equal(value, before)


def test_no_chunks_give_no_entries():
    index, value = top_entries(torch.zeros(0, 9), 4)
    assert index.shape == value.shape == (0, 4)


@pytest.mark.parametrize("sparsity", [17, 24, 33])
@pytest.mark.parametrize("n", [272, 600, 1500])
def test_takes_more_entries_than_a_sorting_network_sorts(n, sparsity):
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(n))
    x[1] = x[1].round()  # ties
    index, value = top_entries(x, sparsity)
    assert index.tolist() == [expected_top(row, sparsity) for row in x.tolist()]
    assert torch.equal(value, x.gather(1, index))

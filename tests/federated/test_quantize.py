import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from federated.quantize import MOST_BITS, choose, message_bits, position_bits, quantize, quantize_within
from tests.tolerances import EPS, SIGMAS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("levels", [1, 2, 3, 7, 100])
def test_the_quantizer_is_unbiased_and_inside_its_bound(levels):
    d, trials = 50, 4000
    x = torch.randn(d, generator=generator())
    drawn = generator(1)
    error = torch.stack([quantize(x, levels, drawn) for _ in range(trials)]).double() - x.double()
    deviation = error.std(0) / math.sqrt(trials)
    assert (error.mean(0).abs() <= SIGMAS * deviation + 4 * EPS).all()
    step = float(x.abs().max() - x.abs().min()) / levels
    assert error.abs().max() <= step * (1 + 1e-5)
    squared = error.square().sum(1)
    assert squared.mean() <= d * step**2 / 4
    # the variance of a coin between two levels, exactly
    u = (x.abs() - x.abs().min()).double() / step
    exact = float(((u - u.floor()) * (1 - u + u.floor())).sum()) * step**2
    assert abs(float(squared.mean()) - exact) <= SIGMAS * float(squared.std()) / math.sqrt(trials)


@given(st.integers(1, 40), st.floats(-8, 8, width=32), st.integers(1, 9))
def test_equal_magnitudes_are_exact(d, magnitude, levels):
    x = magnitude * torch.randint(0, 2, (d,), generator=generator()).mul(2).sub(1)
    assert torch.equal(quantize(x, levels, generator()), x)


def test_every_value_is_one_of_the_levels():
    x = torch.randn(1000, generator=generator())
    low, high = x.abs().min(), x.abs().max()
    level = (quantize(x, 5, generator()).abs() - low) / (high - low) * 5
    assert (level - level.round()).abs().max() < 1e-4
    assert level.round().unique().tolist() == [0, 1, 2, 3, 4, 5]


def serialize(x, levels, index, size):
    """Write a message down, bit by bit: two floats, signs and levels, the rank of the chosen positions."""
    magnitude = x.abs()
    low, high = magnitude.min(), magnitude.max()
    width = math.ceil(math.log2(levels + 1))
    bits = "0" * 64  # the two floats
    for entry in x:
        level = 0 if low == high else round(float((entry.abs() - low) / (high - low) * levels))
        bits += ("1" if entry < 0 else "0") + format(level, f"0{width}b")
    if index is not None and math.comb(size, len(index)) > 1:
        rank = sum(math.comb(int(position), i + 1) for i, position in enumerate(index))
        assert rank < math.comb(size, len(index))
        bits += format(rank, f"0{math.ceil(math.log2(math.comb(size, len(index))))}b")
    return bits


@pytest.mark.parametrize("budget", [90, 120, 200, 400, 500, 1000, math.inf])
def test_the_bits_are_those_of_the_message_written_down(budget):
    x = torch.randn(40, generator=generator(3))
    message = quantize_within(x, budget, generator())
    assert message.bits == len(serialize(message.value, message.levels, message.index, 40))
    assert message.bits <= budget
    if message.index is not None:
        assert message.index.tolist() == sorted(message.index.tolist())
        smallest = x[message.index].abs().min()
        assert (x.abs() > smallest).sum() == len(message.index) - 1


@given(st.integers(1, 60), st.data())
def test_position_bits_name_every_choice(size, data):
    entries = data.draw(st.integers(0, size))
    assert 2 ** position_bits(size, entries) >= math.comb(size, entries) > 2 ** position_bits(size, entries) / 2


def test_position_bits_of_long_vectors_are_whole_numbers_from_the_logarithm():
    assert position_bits(1 << 20, 1) == 20
    assert position_bits(100_000, 1000) == (math.comb(100_000, 1000) - 1).bit_length()


def test_the_cost_of_a_dense_message_is_the_papers():
    assert message_bits(7850, 1) == 64 + 7850 * 2
    assert message_bits(7850, 3) == 64 + 7850 * 3
    assert message_bits(7850, 4) == 64 + 7850 * 4


def expected_error(magnitude, entries, levels):
    kept = magnitude[:entries].double()
    step = float(kept[0] - kept[-1]) / levels
    u = (kept - kept[-1]) / step if step else torch.zeros(entries)
    return float(((u - u.floor()) * (1 - u + u.floor())).sum()) * step**2 + float(magnitude[entries:].square().sum())


@pytest.mark.parametrize("budget", [100, 150, 250, 400, 800])
@pytest.mark.parametrize("power", [1, 3])
def test_the_choice_within_a_budget_is_near_the_best_of_all(budget, power):
    """The rule takes the rounding error's mean over evenly spread entries; the best is found by trying everything."""
    d = 60
    x = torch.randn(d, generator=generator(power)) ** power
    magnitude = x.abs().sort(descending=True).values
    entries, levels = choose(magnitude, budget)
    every = itertools.product(range(1, d + 1), [2**b - 1 for b in range(1, MOST_BITS + 1)])
    best = min(expected_error(magnitude, j, q) for j, q in every if message_bits(d, q, j) <= budget)
    assert message_bits(d, levels, entries) <= budget
    assert expected_error(magnitude, entries, levels) <= 1.1 * best


def test_a_link_too_thin_for_one_entry_carries_nothing():
    x = torch.randn(1024, generator=generator())
    one = message_bits(1024, 1, 1)
    assert one == 64 + 2 + 10
    assert quantize_within(x, one - 1, generator()) is None
    message = quantize_within(x, one, generator())
    assert message.index.tolist() == [int(x.abs().argmax())]
    assert torch.equal(message.value, x[message.index])


def test_without_noise_the_quantizer_has_its_top_levels():
    x = torch.randn(1000, generator=generator())
    message = quantize_within(x, math.inf, generator())
    assert (message.index, message.levels) == (None, 2**MOST_BITS - 1)
    assert (message.dense() - x).abs().max() <= float(x.abs().max()) / (2**MOST_BITS - 1) * 1.01


def test_levels_below_one_are_refused():
    with pytest.raises(ValueError, match="levels must be at least 1, got 0"):
        quantize(torch.ones(3), 0, generator())

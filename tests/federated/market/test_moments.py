"""Moments are those of all the rows, however they come, and their errors those of repeated samples."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from federated.market import moments
from federated.market.measures import shares
from federated.market.moments import StreamingMoments, moments_along
from tests.federated.market.sellers import directions_of, rows

# fp32 sums inside a block against float64 over everything, relative to the mean squared norm.
STREAM = 2**6 * 2**-24
# Var(λ̂)·n is a fourth moment less λ², which cancel where the truth is 0: the root of what rounding leaves.
SE = STREAM**0.5


@given(st.integers(2, 300), st.integers(1, 24), st.integers(1, 100), st.sampled_from([0.0, 1e-3, 1.0, 100.0]))
def test_streaming_equals_in_memory(n: int, count: int, block: int, offset: float) -> None:
    x = rows(n, seed=n) + offset
    v = torch.linalg.qr(torch.randn(24, count, generator=torch.Generator().manual_seed(count))).Q
    stream = StreamingMoments(v, cross=True)
    for part in x.split(block):
        stream.update(part)
    got, y, scale = stream.moments(), x.double() @ v.double(), float(x.double().square().sum(1).mean())
    centred = y - y.mean(0)
    assert got.rows == n
    torch.testing.assert_close(got.mean, y.mean(0), rtol=0, atol=STREAM * math.sqrt(scale))
    torch.testing.assert_close(got.second, y.T @ y / n, rtol=0, atol=STREAM * scale)
    assert got.energy == pytest.approx(scale, rel=STREAM)
    kurtosis = centred.pow(4).mean(0) - centred.square().mean(0).square()
    torch.testing.assert_close(got.variance_se, (kurtosis.clamp_min(0) / n).sqrt(), rtol=1e-3, atol=SE * scale / n**0.5)
    covariance = torch.cov(x.double().T) @ v.double()
    torch.testing.assert_close(stream.cross(), covariance, rtol=0, atol=4 * STREAM * scale * n / (n - 1))


def test_streaming_holds_what_it_held_however_many_rows_come() -> None:
    def held(stream: StreamingMoments) -> int:
        return sum(x.numel() for x in vars(stream).values() if isinstance(x, torch.Tensor))

    stream = StreamingMoments(torch.eye(24)[:, :3])
    few = held(stream.update(rows(10, 0)))
    assert held(stream.update(rows(5000, 1))) == few <= 24 * 3 + 6 * 3 * 3


def test_moments_of_a_union_are_pooled_exactly() -> None:
    a, b, v = rows(70, 1), rows(30, 2) * 2, directions_of(rows(200, 0), 5)
    pooled, whole = moments.pool([moments_along(a, v), moments_along(b, v)]), moments_along(torch.cat([a, b]), v)
    torch.testing.assert_close(pooled.covariance, whole.covariance, rtol=1e-5, atol=1e-6)
    assert pooled.energy == pytest.approx(whole.energy, rel=1e-6)


@pytest.mark.parametrize("heavy", [False, True])
def test_the_standard_error_of_a_variance_is_that_of_repeated_samples(heavy: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 500, 2, generator=generator)
    if heavy:
        x = x.sign() * x.abs().pow(1.5)
    found = [moments_along(sample, torch.eye(2)) for sample in x]
    spread = torch.stack([m.variance for m in found]).std(0)
    stated = torch.stack([m.variance_se for m in found]).mean(0)
    # 400 samples know a standard deviation to 1/√800 = 3.5 %, or twice that with heavy tails; three of those
    torch.testing.assert_close(stated, spread, rtol=0.22 if heavy else 0.11, atol=0)


def test_turning_the_directions_turns_the_moments() -> None:
    x, v = rows(500, 3), directions_of(rows(200, 0), 6)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q
    turned, direct = moments_along(x, v).turned(rotation), moments_along(x, v @ rotation)
    torch.testing.assert_close(turned.covariance, direct.covariance, rtol=1e-4, atol=1e-5)
    # normal rows: an elliptical kurtosis is the right one; a kurtosis from 500 rows × 6 directions is known to ~10 %
    torch.testing.assert_close(turned.variance_se, direct.variance_se, rtol=0.35, atol=0)


def test_bad_rows_are_refused_with_a_sentence() -> None:
    stream = StreamingMoments(torch.eye(24)[:, :2])
    with pytest.raises(ValueError, match="at least 2 rows are needed, got 0"):
        stream.moments()
    stream.update(rows(10, 0))
    bad = rows(10, 0)
    bad[3, 1] = math.nan
    with pytest.raises(ValueError, match="infinity in row 13"):
        stream.update(bad)
    with pytest.raises(ValueError, match="dimension 24, got a tensor of shape \\(5, 23\\)"):
        stream.update(torch.zeros(5, 23))
    with pytest.raises(ValueError, match="must not all be zero"):
        shares(moments_along(torch.zeros(5, 24), torch.eye(24)[:, :2]))
    with pytest.raises(RuntimeError, match="cross=True"):
        stream.cross()


def test_an_empty_batch_changes_nothing_wherever_it_comes() -> None:
    x, v = rows(60, 1), torch.eye(24)[:, :3]
    stream = StreamingMoments(v)
    for part in (x[:0], x[:20], x[:0], x[20:]):
        stream.update(part)
    torch.testing.assert_close(stream.moments().second, moments_along(x, v).second)
    assert stream.rows == 60


@pytest.mark.parametrize("factor", [1e-13, 1e-6, 1e9, 1e15])
def test_moments_of_rows_of_any_length_are_those_of_rows_of_length_one(factor: float) -> None:
    x, v = rows(300, 1), torch.eye(24)[:, :4]
    stream = StreamingMoments(v * 1.0, cross=True)
    got, base = stream.update(x * factor), StreamingMoments(v, cross=True).update(x)
    torch.testing.assert_close(got.cross() / factor**2, base.cross(), rtol=1e-5, atol=1e-6)
    m, one = got.moments(), base.moments()
    for name, power in (("mean", 1), ("second", 2), ("variance_se", 2)):
        torch.testing.assert_close(getattr(m, name) / factor**power, getattr(one, name), rtol=1e-5, atol=1e-6)
    assert m.energy / factor**2 == pytest.approx(one.energy, rel=1e-6)


def test_rows_too_long_for_their_squares_are_a_sentence() -> None:
    x = rows(10, 0)
    x[4] *= 1e25
    with pytest.raises(ValueError, match="norm of at most 1e\\+18, got a longer one in row 4"):
        moments_along(x, torch.eye(24)[:, :2])
    x = rows(10, 0)
    x[4] *= 1e15
    with pytest.raises(ValueError, match="comparable length"):
        StreamingMoments(torch.eye(24)[:, :2]).update(x[:4]).update(x[4:]).moments()


def test_the_error_of_pooled_variances_is_that_of_repeated_samples_even_where_means_differ() -> None:
    v = torch.eye(24)[:, :1]
    pooled = [
        moments.pool([moments_along(rows(100, 2 * seed), v), moments_along(rows(100, 2 * seed + 1) + 3, v)])
        for seed in range(300)
    ]
    spread = torch.stack([m.variance for m in pooled]).std(0)
    # 300 samples know a standard deviation to 1/√600 = 4 %; three of those
    torch.testing.assert_close(torch.stack([m.variance_se for m in pooled]).mean(0), spread, rtol=0.12, atol=0)


def test_noise_of_pooled_sellers_adds_up_in_squares() -> None:
    v = torch.eye(24)[:, :3]
    parts = [replace(moments_along(rows(n, n), v), mean_noise=0.3, second_noise=0.4, energy_se=0.5) for n in (30, 90)]
    pooled = moments.pool(parts)
    share = math.hypot(0.25, 0.75)
    got = (pooled.mean_noise, pooled.second_noise, pooled.energy_se)
    assert got == pytest.approx((0.3 * share, 0.4 * share, 0.5 * share))

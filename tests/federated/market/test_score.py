"""Each measure against known answers, its laws, and the weak points of the published forms that ours must not share."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from federated.market import reference, score
from federated.market.score import StreamingMoments, moments_along, overlaps, shares

# Eigenvalues given to four digits, a relative error of 1e-4 / 2 / 0.1: a ratio is known to 1e-3, a mean of ten to less.
KNOWN = 1e-3
# fp32 sums inside a block against float64 over everything, relative to the mean squared norm.
STREAM = 2**6 * 2**-24
# Var(λ̂)·n is a fourth moment less λ², which cancel where the truth is 0: the root of what rounding leaves.
SE = STREAM**0.5

# [MARKET], MNIST's directions: CLIP ViT-B/16, κ = 10, `norm` values.
BUYER = [1.0635, 0.8383, 0.4283, 0.3374, 0.2579, 0.2489, 0.1815, 0.1711, 0.1444, 0.1130]
SELLERS = {
    "MNIST": ([0.9987, 0.7710, 0.4136, 0.3117, 0.2627, 0.2377, 0.1630, 0.1728, 0.1512, 0.1142], 0.951, 0.037),
    "EMNIST": ([0.8215, 0.3944, 0.1839, 0.3997, 0.2029, 0.1465, 0.1692, 0.1898, 0.2464, 0.1249], 0.697, 0.219),
    "Fashion-MNIST": ([0.3647, 0.4116, 0.1768, 0.3117, 0.2876, 0.2151, 0.2592, 0.3373, 0.2871, 0.2676], 0.572, 0.313),
    "SVHN": ([0.3519, 1.667, 0.3493, 0.4886, 0.5151, 0.3781, 0.4233, 0.3441, 0.3086, 0.4195], 0.492, 0.453),
    "CIFAR-10": ([0.6618, 0.2843, 0.1836, 0.5535, 0.6645, 0.2331, 1.0317, 0.2591, 0.3727, 0.3370], 0.445, 0.436),
}


def rows(n: int, seed: int, spread: torch.Tensor | None = None) -> torch.Tensor:
    """Normal rows of falling spread in 24 dimensions around a common mean."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0, 3, 24).neg().exp() if spread is None else spread
    return torch.randn(n, 24, generator=generator) * spread + 0.5


def directions_of(x: torch.Tensor, count: int) -> torch.Tensor:
    return torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:count].T.contiguous()


def both(buyer: torch.Tensor, seller: torch.Tensor, count: int = 6) -> tuple[score.Moments, score.Moments]:
    v = directions_of(buyer, count)
    return moments_along(buyer, v), moments_along(seller, v)


def ours(buyer: torch.Tensor, seller: torch.Tensor, by: str = "relevance") -> float:
    return score.score(*both(buyer, seller), by, draws=0).value


def published(buyer: torch.Tensor, seller: torch.Tensor, measure=reference.relevance, count: int = 6) -> float:
    v = directions_of(buyer, count)
    b, s = (StreamingMoments(v, cross=True).update(x).cross() for x in (buyer, seller))
    return measure(reference.norm_values(b), reference.norm_values(s))


@pytest.mark.parametrize("name", SELLERS)
def test_the_published_forms_give_the_published_answers(name: str) -> None:
    values, relevance, diversity = SELLERS[name]
    buyer, seller = torch.tensor(BUYER), torch.tensor(values)
    assert reference.relevance(buyer, seller) == pytest.approx(relevance, abs=KNOWN)
    assert reference.diversity(buyer, seller) == pytest.approx(diversity, abs=KNOWN)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=12))
def test_relevance_and_diversity_add_up_to_at_most_one(pairs: list[tuple[float, float]]) -> None:
    buyer, seller = torch.tensor(pairs, dtype=torch.float64).T
    if (buyer >= 0.1).any():
        total = reference.relevance(buyer, seller) + reference.diversity(buyer, seller)
        assert total <= 1 + 1e-9
    overlap = torch.minimum(buyer, seller) / torch.maximum(buyer, seller).clamp_min(1e-300)
    for weight in (None, (buyer + 1e-9) / (buyer + 1e-9).sum()):
        assert float(score.relevance(overlap, weight) + score.diversity(overlap, weight)) <= 1 + 1e-9


def test_scores_lie_between_floor_and_one_less_floor() -> None:
    for overlap in (torch.zeros(5), torch.ones(5)):
        assert {round(float(score.relevance(overlap)), 6), round(float(score.diversity(overlap)), 6)} == {0.05, 0.95}


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
    pooled, whole = score.pool([moments_along(a, v), moments_along(b, v)]), moments_along(torch.cat([a, b]), v)
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


def test_the_standard_error_of_relevance_covers_what_repeated_samples_give() -> None:
    buyer, v = rows(400, 1000), directions_of(rows(400, 1000), 6)
    b = moments_along(buyer, v)
    found = [score.score(b, moments_along(rows(200, seed), v), draws=0).value for seed in range(200)]
    stated = score.score(b, moments_along(rows(200, 7), v), draws=2000).standard_error
    # the stated error also has the buyer's own sampling in it, half as much as the seller's here
    assert 0.8 < stated / torch.tensor(found).std() < 2.0


def test_a_threshold_relative_to_the_first_eigenvalue_judges_unit_norm_rows() -> None:
    buyer, same = (torch.nn.functional.normalize(rows(300, s) - 0.5, dim=1) / 4 for s in (1, 2))
    other = same.flip(1)
    assert published(buyer, same) == published(buyer, other) == 1.0  # no eigenvalue reaches 0.1
    assert ours(buyer, same) > 0.7 > 0.4 > ours(buyer, other)


def test_correlation_does_not_change_with_the_sign_of_an_eigenvector() -> None:
    x, y = rows(300, 1), rows(300, 2) * torch.linspace(1, 0.3, 24)
    v = directions_of(x, 6)
    turned = v * torch.tensor([1.0, -1, 1, 1, -1, 1])

    def theirs(v: torch.Tensor) -> float:
        means = [StreamingMoments(v, cross=True).update(side).cross().mean(0) for side in (x, y)]
        return reference.correlation(*means)

    def mine(v: torch.Tensor, measure) -> float:
        b, s = shares(moments_along(x, v)), shares(moments_along(y, v))
        return float(measure(b, s, score.kept_directions(b)))

    assert abs(theirs(v) - theirs(turned)) > 1e-3
    for measure in (score.correlation, score.cosine, score.l2):
        assert mine(v, measure) == pytest.approx(mine(turned, measure), abs=1e-6)


def test_one_dead_direction_does_not_undo_all_the_others() -> None:
    buyer, seller = torch.tensor(BUYER), torch.tensor(SELLERS["MNIST"][0])
    seller[4] = 0
    assert reference.relevance(buyer, seller) == 0
    overlap = torch.minimum(buyer, seller) / torch.maximum(buyer, seller)
    whole = overlap.clone()
    whole[4] = 1
    assert score.relevance(overlap) > 0.6
    assert score.relevance(overlap) < score.relevance(whole)


def test_a_direction_counts_by_the_buyers_variance_along_it() -> None:
    own = shares(moments_along(rows(300, 1) - 0.5, torch.eye(24)[:, :6]))
    weight = score.weights(own, torch.ones(6, dtype=torch.bool))
    assert float(weight.sum()) == pytest.approx(1)
    torch.testing.assert_close(weight[:6] / weight[0], own.variance / own.variance[0])
    buyer, seller = torch.tensor([1.0, 0.2]), torch.tensor([[1.0, 0.1], [0.5, 0.2]])
    assert reference.relevance(buyer, seller[0]) == reference.relevance(buyer, seller[1])  # whichever direction is off
    assert float(weight[6]) == pytest.approx(float(weight[:6].mean()))
    first, last = torch.ones(2, 7)
    first[0], last[5] = 0, 0
    assert score.relevance(first, weight) < score.relevance(last, weight) < score.relevance(torch.ones(7), weight)


def test_one_exact_match_does_not_undo_the_diversity_of_all_the_others() -> None:
    buyer, seller = torch.tensor(BUYER), torch.tensor(SELLERS["CIFAR-10"][0])
    seller[4] = buyer[4]
    assert reference.diversity(buyer, seller) == 0
    assert score.diversity(torch.minimum(buyer, seller) / torch.maximum(buyer, seller)) > 0.3


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_scores_do_not_change_when_the_seller_rescales(factor: float) -> None:
    buyer, seller = rows(300, 1), rows(300, 2)
    assert published(buyer, seller * factor) < 0.5 * published(buyer, seller)
    assert ours(buyer, seller * factor) == pytest.approx(ours(buyer, seller), abs=1e-5)


@pytest.mark.parametrize("inside", [True, False])
def test_a_shift_of_the_mean_is_seen(inside: bool) -> None:
    buyer, seller = rows(300, 1) - 0.5, rows(300, 2) - 0.5
    shift = torch.zeros(24)
    shift[0 if inside else 23] = 3.0
    assert published(buyer, seller + shift) == pytest.approx(published(buyer, seller), abs=1e-5)
    assert ours(buyer, seller + shift) < 0.8 * ours(buyer, seller)


def test_duplicates_raise_no_score() -> None:
    buyer, seller = rows(300, 1), rows(60, 2)
    b, once = both(buyer, seller)
    twice = both(buyer, seller.repeat(2, 1))[1]
    raised = reference.volume(twice.second, twice.rows) - reference.volume(once.second, once.rows)
    assert raised == pytest.approx(6 * math.log(2), abs=1e-4)
    kept = score.kept_directions(shares(b))
    volumes = [float(score.volume(score.side(b), score.side(s), kept)) for s in (once, twice)]
    assert volumes[1] == pytest.approx(volumes[0], abs=1e-5)
    for by in ("relevance", "diversity"):
        one, two = (score.score(b, s, by, draws=0).value for s in (once, twice))
        assert two == pytest.approx(one, abs=1e-5)


def test_noise_raises_neither_relevance_nor_coverage() -> None:
    buyer, seller = rows(300, 1), rows(300, 2)
    noisy = seller + torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    b, clean = both(buyer, seller)
    noise = both(buyer, noisy)[1]
    assert reference.volume(noise.second, 300) > reference.volume(clean.second, 300)
    assert reference.dispersion(noise.variance) > reference.dispersion(clean.variance)
    kept, sb = score.kept_directions(shares(b)), shares(b)
    assert score.volume(*map(score.side, (b, noise)), kept) < score.volume(*map(score.side, (b, clean)), kept)
    assert score.dispersion(sb, shares(noise), kept) < score.dispersion(sb, shares(clean), kept)
    assert ours(buyer, noisy) < 0.9 * ours(buyer, seller)


def test_the_published_value_of_a_direction_counts_variance_that_lies_elsewhere() -> None:
    x = rows(3000, 1, torch.ones(24)) - 0.5
    v = torch.eye(24)[:, :1]
    entangled = x.clone()
    entangled[:, 1] += 5 * x[:, 0]  # the rows now vary with what they do along v, and along v as before
    values = [reference.norm_values(StreamingMoments(v, cross=True).update(side).cross()) for side in (x, entangled)]
    assert float(values[1]) > 4 * float(values[0])
    one, two = (moments_along(side, v).variance for side in (x, entangled))
    assert float(two) == pytest.approx(float(one), rel=1e-5)


def test_the_vendi_score_of_orthogonal_groups_is_their_number() -> None:
    groups = torch.eye(24)[torch.arange(12) % 4]
    x = groups * torch.linspace(1, 3, 12)[:, None]
    assert reference.vendi(x) == pytest.approx(4)
    assert float(score.vendi(score.side(moments_along(groups, torch.eye(24)[:, :6])))) == pytest.approx(4)


def test_turning_the_directions_turns_the_moments() -> None:
    x, v = rows(500, 3), directions_of(rows(200, 0), 6)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q
    turned, direct = moments_along(x, v).turned(rotation), moments_along(x, v @ rotation)
    torch.testing.assert_close(turned.covariance, direct.covariance, rtol=1e-4, atol=1e-5)
    # normal rows: an elliptical kurtosis is the right one; a kurtosis from 500 rows × 6 directions is known to ~10 %
    torch.testing.assert_close(turned.variance_se, direct.variance_se, rtol=0.35, atol=0)


def test_a_seller_like_the_buyer_in_nothing_overlaps_in_nothing_and_itself_in_all() -> None:
    x = rows(100, 1)
    b = shares(moments_along(x, directions_of(x, 4)))
    kept = score.kept_directions(b)
    torch.testing.assert_close(overlaps(b, b, kept), torch.ones(int(kept.sum()) + 1, dtype=torch.float64))


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


def test_sensitivity_read_off_the_data_tells_of_one_row() -> None:
    x = rows(100, 0)
    neighbour = x.clone()
    neighbour[0] *= 50
    assert reference.data_dependent_noise(neighbour, 1, 1e-6) > 5 * reference.data_dependent_noise(x, 1, 1e-6)


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
        score.pool([moments_along(rows(100, 2 * seed), v), moments_along(rows(100, 2 * seed + 1) + 3, v)])
        for seed in range(300)
    ]
    spread = torch.stack([m.variance for m in pooled]).std(0)
    # 300 samples know a standard deviation to 1/√600 = 4 %; three of those
    torch.testing.assert_close(torch.stack([m.variance_se for m in pooled]).mean(0), spread, rtol=0.12, atol=0)


@pytest.mark.parametrize("by", ["relevance", "volume", "vendi"])
@pytest.mark.parametrize("far", [False, True])
def test_the_error_of_a_difference_is_what_repeated_samples_of_all_sides_scatter_by(by: str, far: bool) -> None:
    v = torch.eye(24)[:, :6]
    falling = torch.linspace(0, 3, 24).neg().exp()
    measure = score.MEASURES[by]

    def difference(draw) -> torch.Tensor:
        buyer, one, other = (draw(*x) for x in ((200, 1, falling), (300, 2, falling), (300, 3, falling ** (1 + far))))
        return measure(buyer, one, kept, weight) - measure(buyer, other, kept, weight)

    own = shares(moments_along(rows(200, 1), v))
    kept = score.kept_directions(own)
    weight = score.weights(own, kept)
    found = [difference(lambda n, i, s, t=t: score.side(moments_along(rows(n, 10 * t + i, s), v))) for t in range(150)]
    generator = torch.Generator().manual_seed(0)
    drawn = difference(lambda n, i, s: score.draw(moments_along(rows(n, i, s), v), 500, generator))
    # 150 samples know a standard deviation to 6 %, one sample's kurtosis moves the stated one by as much and more
    assert 0.8 < float(drawn.std() / torch.stack(found).std()) < 1.4


def test_draws_have_the_moments_and_the_errors_that_were_stated() -> None:
    x = rows(500, 3) * (1 + torch.rand(500, 1, generator=torch.Generator().manual_seed(0)) * 2)  # heavy tails
    m = moments_along(x, directions_of(x, 5))
    noisy = score.replace(m, mean_noise=0.02, second_noise=0.03)
    for given_, extra_mean, extra in ((m, 0.0, 0.0), (noisy, 0.02, 0.03)):
        drawn = score.draw(given_, 4000, torch.Generator().manual_seed(0))
        variance = drawn.covariance.diagonal(dim1=1, dim2=2)
        error = (m.variance * score._relative_error(m)).square().add(extra**2).sqrt()
        # 4000 draws know a mean to 1/√4000 of its standard deviation (times 4), and that to 1/√8000 (times 5)
        assert float(((variance.mean(0) - m.variance) / error).abs().max()) < 0.064
        torch.testing.assert_close(variance.std(0), error, rtol=0.06, atol=0)
        mean_error = (m.variance / m.rows + extra_mean**2).sqrt()
        torch.testing.assert_close(drawn.mean.std(0), mean_error, rtol=0.06, atol=0)
        assert float(drawn.energy.std()) == pytest.approx(m.energy_se, rel=0.06)
        assert float(drawn.covariance[:, 0, 1].std()) > extra / math.sqrt(2)
    unit = score.replace(m, energy_se=0.0)
    assert float(score.draw(unit, 100, torch.Generator().manual_seed(0)).energy.std()) == pytest.approx(0, abs=1e-12)


def test_a_direction_that_noise_has_made_negative_is_drawn_with_its_noise() -> None:
    second = torch.diag(torch.tensor([1.0, -0.02], dtype=torch.float64))
    m = score.Moments(1000, torch.zeros(2).double(), second, 2.0, torch.tensor([0.04, 0.0]).double(), 0.0, 0.1, 0.1)
    drawn = score.draw(m, 2000, torch.Generator().manual_seed(0)).covariance[:, 1, 1]
    assert float(drawn.std()) == pytest.approx(0.1, rel=0.08)


def test_a_score_by_a_name_that_is_none_is_a_sentence() -> None:
    b, s = both(rows(100, 1), rows(100, 2))
    with pytest.raises(ValueError, match="one of relevance, .*, vendi, got 'price'"):
        score.score(b, s, "price")
    with pytest.raises(ValueError, match="same directions, got 6 and 5"):
        score.score(b, moments_along(rows(100, 2), torch.eye(24)[:, :5]))


def test_a_shift_costs_what_it_costs_in_the_overlap_of_two_normal_densities() -> None:
    p, q, a, b = 0.3, 0.1, 0.2, -0.4
    one, other = (
        score.Shares(torch.tensor([v]).double(), torch.tensor([m]).double(), torch.tensor(0.0).double())
        for v, m in ((p, a), (q, b))
    )
    got = float(overlaps(one, other, torch.ones(1, dtype=torch.bool))[0])
    x = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    densities = [torch.distributions.Normal(torch.tensor(m).double(), v**0.5).log_prob(x) for v, m in ((p, a), (q, b))]
    coefficient = float(torch.trapezoid((sum(densities) / 2).exp(), x))
    spread = math.sqrt(2 * math.sqrt(p * q) / (p + q))  # the part of the coefficient that no shift causes
    assert got == pytest.approx(q / p * coefficient / spread, rel=1e-6)


def by_hand(b: score.Moments, s: score.Moments) -> dict[str, float]:
    """Every measure as docs/market.md writes it, in plain loops."""
    energies = (b.energy, s.energy)
    variance = [
        [float(m.covariance[i, i]) / e for i in range(len(m.mean))] for m, e in zip((b, s), energies, strict=True)
    ]
    mean = [[float(x) / math.sqrt(e) for x in m.mean] for m, e in zip((b, s), energies, strict=True)]
    size = [[v + a * a for v, a in zip(vs, ms, strict=True)] for vs, ms in zip(variance, mean, strict=True)]
    rest = [1 - sum(x) for x in size]
    kept = [i for i, x in enumerate(size[0]) if x >= 0.01 * max(variance[0])]
    overlap, weight = [], []
    for i in kept:
        p, q, shift = variance[0][i], variance[1][i], mean[0][i] - mean[1][i]
        overlap.append(min(p, q) / max(p, q) * math.exp(-(shift**2) / (4 * (p + q))))
        weight.append(p / sum(variance[0][j] for j in kept))
    overlap.append(min(rest) / max(rest))
    weight.append(1 / len(kept))
    weight = [w / sum(weight) for w in weight]
    held = [0.05 + 0.9 * r for r in overlap]
    spectra = [[math.sqrt(x[i]) for i in kept] + [math.sqrt(r)] for x, r in zip(size, rest, strict=True)]

    def cosine(x: list[float], y: list[float]) -> float:
        return sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)

    centred = [[x - sum(spectrum) / len(spectrum) for x in spectrum] for spectrum in spectra]
    cov_b, cov_s = (m.covariance[kept][:, kept].numpy() / e for m, e in zip((b, s), energies, strict=True))
    relative = np.linalg.eigvals(np.linalg.solve(cov_b, cov_s)).real
    second = np.linalg.eigvalsh(s.second.numpy())
    second = second / second.sum()
    return {
        "relevance": math.prod(r**w for r, w in zip(held, weight, strict=True)),
        "diversity": math.prod((1 - r) ** w for r, w in zip(held, weight, strict=True)),
        "volume": float(np.log(relative.clip(0.05, 1)).mean()),
        "dispersion": math.prod(
            math.sqrt(min(max(variance[1][i] / variance[0][i], 0.05), 1)) ** (1 / len(kept)) for i in kept
        ),
        "l2": -math.dist(*spectra),
        "cosine": cosine(*spectra),
        "correlation": cosine(*centred),
        "vendi": math.exp(-sum(x * math.log(x) for x in second if x > 0)),
    }


@pytest.mark.parametrize("seed", range(4))
def test_every_measure_is_its_equation(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.02, 0.01, *[0.3] * 18])
    shift = torch.zeros(24)
    shift[0], shift[5], shift[20] = (
        0.7,
        6.0,
        0.2,
    )  # a mean that is large where little varies, and all that is kept there
    turn = torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q
    v = (torch.eye(24)[:, :6] + 0.02 * turn[:, :6]).double()
    v = torch.linalg.qr(v).Q.float()
    # the seller varies more along some directions and hardly along others
    factor = torch.ones(24)
    factor[:6] = torch.tensor([0.6, 2.0, 0.01, 1.5, 1.0, 1.0])
    b = moments_along(torch.randn(200, 24, generator=generator) * spread + shift, v)
    s = moments_along(torch.randn(300, 24, generator=generator) * spread * factor + 0.8 * shift, v)
    own = shares(b)
    kept = score.kept_directions(own)
    assert 0 < int(kept.sum()) < 6
    weight = score.weights(own, kept)
    expected = by_hand(b, s)
    assert set(expected) == set(score.MEASURES)
    for name, measure in score.MEASURES.items():
        assert float(measure(score.side(b), score.side(s), kept, weight)) == pytest.approx(expected[name], rel=1e-6), (
            name
        )
        assert score.score(b, s, name, draws=0).value == pytest.approx(expected[name], rel=1e-6)


def test_a_covariance_is_inverted_down_to_a_millionth_of_its_largest_variance() -> None:
    covariance = torch.diag(torch.tensor([4.0, 4e-4, 0.0, -1e-3], dtype=torch.float64))
    expected = torch.diag(torch.tensor([0.5, 50.0, 500.0, 500.0], dtype=torch.float64))
    torch.testing.assert_close(score.inverse_root(covariance), expected)


def test_noise_of_pooled_sellers_adds_up_in_squares() -> None:
    v = torch.eye(24)[:, :3]
    parts = [
        score.replace(moments_along(rows(n, n), v), mean_noise=0.3, second_noise=0.4, energy_se=0.5) for n in (30, 90)
    ]
    pooled = score.pool(parts)
    share = math.hypot(0.25, 0.75)
    got = (pooled.mean_noise, pooled.second_noise, pooled.energy_se)
    assert got == pytest.approx((0.3 * share, 0.4 * share, 0.5 * share))

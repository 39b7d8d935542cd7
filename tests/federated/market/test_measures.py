"""Each measure against known answers, its laws, and the weak points of the published forms that ours must not share."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from federated.market import measures, moments, reference, score
from federated.market.measures import overlaps, shares
from federated.market.moments import StreamingMoments, moments_along
from tests.federated.market.sellers import both, directions_of, rows

# Eigenvalues given to four digits, a relative error of 1e-4 / 2 / 0.1: a ratio is known to 1e-3, a mean of ten to less.
KNOWN = 1e-3
# [MARKET], MNIST's directions: CLIP ViT-B/16, κ = 10, `norm` values.
BUYER = [1.0635, 0.8383, 0.4283, 0.3374, 0.2579, 0.2489, 0.1815, 0.1711, 0.1444, 0.1130]
SELLERS = {
    "MNIST": ([0.9987, 0.7710, 0.4136, 0.3117, 0.2627, 0.2377, 0.1630, 0.1728, 0.1512, 0.1142], 0.951, 0.037),
    "EMNIST": ([0.8215, 0.3944, 0.1839, 0.3997, 0.2029, 0.1465, 0.1692, 0.1898, 0.2464, 0.1249], 0.697, 0.219),
    "Fashion-MNIST": ([0.3647, 0.4116, 0.1768, 0.3117, 0.2876, 0.2151, 0.2592, 0.3373, 0.2871, 0.2676], 0.572, 0.313),
    "SVHN": ([0.3519, 1.667, 0.3493, 0.4886, 0.5151, 0.3781, 0.4233, 0.3441, 0.3086, 0.4195], 0.492, 0.453),
    "CIFAR-10": ([0.6618, 0.2843, 0.1836, 0.5535, 0.6645, 0.2331, 1.0317, 0.2591, 0.3727, 0.3370], 0.445, 0.436),
}


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
        assert float(measures.relevance(overlap, weight) + measures.diversity(overlap, weight)) <= 1 + 1e-9


def test_scores_lie_between_floor_and_one_less_floor() -> None:
    for overlap in (torch.zeros(5), torch.ones(5)):
        assert {round(float(measures.relevance(overlap)), 6), round(float(measures.diversity(overlap)), 6)} == {
            0.05,
            0.95,
        }


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
        return float(measure(b, s, measures.kept_directions(b)))

    assert abs(theirs(v) - theirs(turned)) > 1e-3
    for measure in (measures.correlation, measures.cosine, measures.l2):
        assert mine(v, measure) == pytest.approx(mine(turned, measure), abs=1e-6)


def test_one_dead_direction_does_not_undo_all_the_others() -> None:
    buyer, seller = torch.tensor(BUYER), torch.tensor(SELLERS["MNIST"][0])
    seller[4] = 0
    assert reference.relevance(buyer, seller) == 0
    overlap = torch.minimum(buyer, seller) / torch.maximum(buyer, seller)
    whole = overlap.clone()
    whole[4] = 1
    assert measures.relevance(overlap) > 0.6
    assert measures.relevance(overlap) < measures.relevance(whole)


def test_a_direction_counts_by_the_buyers_variance_along_it() -> None:
    own = shares(moments_along(rows(300, 1) - 0.5, torch.eye(24)[:, :6]))
    weight = measures.weights(own, torch.ones(6, dtype=torch.bool))
    assert float(weight.sum()) == pytest.approx(1)
    torch.testing.assert_close(weight[:6] / weight[0], own.variance / own.variance[0])
    buyer, seller = torch.tensor([1.0, 0.2]), torch.tensor([[1.0, 0.1], [0.5, 0.2]])
    assert reference.relevance(buyer, seller[0]) == reference.relevance(buyer, seller[1])  # whichever direction is off
    assert float(weight[6]) == pytest.approx(float(weight[:6].mean()))
    first, last = torch.ones(2, 7)
    first[0], last[5] = 0, 0
    assert (
        measures.relevance(first, weight) < measures.relevance(last, weight) < measures.relevance(torch.ones(7), weight)
    )


def test_one_exact_match_does_not_undo_the_diversity_of_all_the_others() -> None:
    buyer, seller = torch.tensor(BUYER), torch.tensor(SELLERS["CIFAR-10"][0])
    seller[4] = buyer[4]
    assert reference.diversity(buyer, seller) == 0
    assert measures.diversity(torch.minimum(buyer, seller) / torch.maximum(buyer, seller)) > 0.3


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
    kept = measures.kept_directions(shares(b))
    volumes = [float(measures.volume(measures.side(b), measures.side(s), kept)) for s in (once, twice)]
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
    kept, sb = measures.kept_directions(shares(b)), shares(b)
    assert measures.volume(*map(measures.side, (b, noise)), kept) < measures.volume(
        *map(measures.side, (b, clean)), kept
    )
    assert measures.dispersion(sb, shares(noise), kept) < measures.dispersion(sb, shares(clean), kept)
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
    assert float(measures.vendi(measures.side(moments_along(groups, torch.eye(24)[:, :6])))) == pytest.approx(4)


def test_a_seller_like_the_buyer_in_nothing_overlaps_in_nothing_and_itself_in_all() -> None:
    x = rows(100, 1)
    b = shares(moments_along(x, directions_of(x, 4)))
    kept = measures.kept_directions(b)
    torch.testing.assert_close(overlaps(b, b, kept), torch.ones(int(kept.sum()) + 1, dtype=torch.float64))


def test_sensitivity_read_off_the_data_tells_of_one_row() -> None:
    x = rows(100, 0)
    neighbour = x.clone()
    neighbour[0] *= 50
    assert reference.data_dependent_noise(neighbour, 1, 1e-6) > 5 * reference.data_dependent_noise(x, 1, 1e-6)


def test_a_shift_costs_what_it_costs_in_the_overlap_of_two_normal_densities() -> None:
    p, q, a, b = 0.3, 0.1, 0.2, -0.4
    one, other = (
        measures.Shares(torch.tensor([v]).double(), torch.tensor([m]).double(), torch.tensor(0.0).double())
        for v, m in ((p, a), (q, b))
    )
    got = float(overlaps(one, other, torch.ones(1, dtype=torch.bool))[0])
    x = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    densities = [torch.distributions.Normal(torch.tensor(m).double(), v**0.5).log_prob(x) for v, m in ((p, a), (q, b))]
    coefficient = float(torch.trapezoid((sum(densities) / 2).exp(), x))
    spread = math.sqrt(2 * math.sqrt(p * q) / (p + q))  # the part of the coefficient that no shift causes
    assert got == pytest.approx(q / p * coefficient / spread, rel=1e-6)


def by_hand(b: moments.Moments, s: moments.Moments) -> dict[str, float]:
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
    kept = measures.kept_directions(own)
    assert 0 < int(kept.sum()) < 6
    weight = measures.weights(own, kept)
    expected = by_hand(b, s)
    assert set(expected) == set(measures.MEASURES)
    for name, measure in measures.MEASURES.items():
        assert float(measure(measures.side(b), measures.side(s), kept, weight)) == pytest.approx(
            expected[name], rel=1e-6
        ), name
        assert score.score(b, s, name, draws=0).value == pytest.approx(expected[name], rel=1e-6)


def test_a_covariance_is_inverted_down_to_a_millionth_of_its_largest_variance() -> None:
    covariance = torch.diag(torch.tensor([4.0, 4e-4, 0.0, -1e-3], dtype=torch.float64))
    expected = torch.diag(torch.tensor([0.5, 50.0, 500.0, 500.0], dtype=torch.float64))
    torch.testing.assert_close(measures.inverse_root(covariance), expected)

"""The error of a score is what other samples of both sides scatter by."""

import math
from dataclasses import replace

import pytest
import torch

from federated.market import measures, moments, score
from federated.market.measures import shares
from federated.market.moments import moments_along
from tests.federated.market.sellers import both, directions_of, rows


def test_the_standard_error_of_relevance_covers_what_repeated_samples_give() -> None:
    buyer, v = rows(400, 1000), directions_of(rows(400, 1000), 6)
    b = moments_along(buyer, v)
    found = [score.score(b, moments_along(rows(200, seed), v), draws=0).value for seed in range(200)]
    stated = score.score(b, moments_along(rows(200, 7), v), draws=2000).standard_error
    # the stated error also has the buyer's own sampling in it, half as much as the seller's here
    assert 0.8 < stated / torch.tensor(found).std() < 2.0


@pytest.mark.parametrize("by", ["relevance", "volume", "vendi"])
@pytest.mark.parametrize("far", [False, True])
def test_the_error_of_a_difference_is_what_repeated_samples_of_all_sides_scatter_by(by: str, far: bool) -> None:
    v = torch.eye(24)[:, :6]
    falling = torch.linspace(0, 3, 24).neg().exp()
    measure = measures.MEASURES[by]

    def difference(draw) -> torch.Tensor:
        buyer, one, other = (draw(*x) for x in ((200, 1, falling), (300, 2, falling), (300, 3, falling ** (1 + far))))
        return measure(buyer, one, kept, weight) - measure(buyer, other, kept, weight)

    own = shares(moments_along(rows(200, 1), v))
    kept = measures.kept_directions(own)
    weight = measures.weights(own, kept)
    found = [
        difference(lambda n, i, s, t=t: measures.side(moments_along(rows(n, 10 * t + i, s), v))) for t in range(150)
    ]
    generator = torch.Generator().manual_seed(0)
    drawn = difference(lambda n, i, s: score.draw(moments_along(rows(n, i, s), v), 500, generator))
    # 150 samples know a standard deviation to 6 %, one sample's kurtosis moves the stated one by as much and more
    assert 0.8 < float(drawn.std() / torch.stack(found).std()) < 1.4


def test_draws_have_the_moments_and_the_errors_that_were_stated() -> None:
    x = rows(500, 3) * (1 + torch.rand(500, 1, generator=torch.Generator().manual_seed(0)) * 2)  # heavy tails
    m = moments_along(x, directions_of(x, 5))
    noisy = replace(m, mean_noise=0.02, second_noise=0.03)
    for given_, extra_mean, extra in ((m, 0.0, 0.0), (noisy, 0.02, 0.03)):
        drawn = score.draw(given_, 4000, torch.Generator().manual_seed(0))
        variance = drawn.covariance.diagonal(dim1=1, dim2=2)
        error = (m.variance * moments.relative_error(m)).square().add(extra**2).sqrt()
        # 4000 draws know a mean to 1/√4000 of its standard deviation (times 4), and that to 1/√8000 (times 5)
        assert float(((variance.mean(0) - m.variance) / error).abs().max()) < 0.064
        torch.testing.assert_close(variance.std(0), error, rtol=0.06, atol=0)
        mean_error = (m.variance / m.rows + extra_mean**2).sqrt()
        torch.testing.assert_close(drawn.mean.std(0), mean_error, rtol=0.06, atol=0)
        assert float(drawn.energy.std()) == pytest.approx(m.energy_se, rel=0.06)
        assert float(drawn.covariance[:, 0, 1].std()) > extra / math.sqrt(2)
    unit = replace(m, energy_se=0.0)
    assert float(score.draw(unit, 100, torch.Generator().manual_seed(0)).energy.std()) == pytest.approx(0, abs=1e-12)


def test_a_direction_that_noise_has_made_negative_is_drawn_with_its_noise() -> None:
    second = torch.diag(torch.tensor([1.0, -0.02], dtype=torch.float64))
    m = moments.Moments(1000, torch.zeros(2).double(), second, 2.0, torch.tensor([0.04, 0.0]).double(), 0.0, 0.1, 0.1)
    drawn = score.draw(m, 2000, torch.Generator().manual_seed(0)).covariance[:, 1, 1]
    assert float(drawn.std()) == pytest.approx(0.1, rel=0.08)


def test_a_score_by_a_name_that_is_none_is_a_sentence() -> None:
    b, s = both(rows(100, 1), rows(100, 2))
    with pytest.raises(ValueError, match="one of relevance, .*, vendi, got 'price'"):
        score.score(b, s, "price")
    with pytest.raises(ValueError, match="same directions, got 6 and 5"):
        score.score(b, moments_along(rows(100, 2), torch.eye(24)[:, :5]))

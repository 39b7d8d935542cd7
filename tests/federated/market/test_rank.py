"""Ranks are right as often as they say, and portfolios are as good as their guarantee."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.market import rank as r
from federated.market.measures import (
    MEASURES,
    kept_directions,
    overlaps,
    relative_covariance,
    relevance,
    shares,
    side,
    weights,
)
from federated.market.moments import Moments, moments_along

D = 16
SPREAD = torch.linspace(0, 2, D).neg().exp()


def rows(n: int, seed: int, spread: torch.Tensor = SPREAD) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) * spread


def along(x: torch.Tensor, count: int = 6) -> Moments:
    return moments_along(x, torch.eye(D)[:, :count])


def test_sellers_are_ranked_by_their_scores_best_first() -> None:
    sellers = {
        "flat": along(rows(300, 1, torch.ones(D))),
        "same": along(rows(300, 2)),
        "less": along(rows(300, 3, SPREAD**2)),
    }
    found = r.rank(along(rows(300, 0)), sellers)
    assert [x.seller for x in found] == ["same", "less", "flat"]
    assert [x.rank for x in found] == [1, 2, 3]
    assert all(x.rank_low <= x.rank <= x.rank_high for x in found)
    assert all(0 < x.relevance.standard_error < 0.1 for x in found)
    assert (found[0].rank_low, found[0].rank_high) == (1, 1)
    by_difference = r.rank(along(rows(300, 0)), sellers, by="diversity")
    assert by_difference[-1].seller == "same"


def test_equal_sellers_are_not_told_apart_and_copies_share_a_rank() -> None:
    one = along(rows(100, 2))
    found = {x.seller: x for x in r.rank(along(rows(100, 0)), {"a": one, "b": one, "other": along(rows(100, 3))})}
    assert found["a"].rank == found["b"].rank
    assert {(x.rank_low, x.rank_high) for x in found.values()} == {(1, 3)}


def test_more_rows_make_intervals_narrower() -> None:
    def width(n: int) -> int:
        sellers = {str(i): along(rows(n, i + 1, SPREAD ** (1 + 0.1 * i))) for i in range(6)}
        return sum(x.rank_high - x.rank_low for x in r.rank(along(rows(2000, 0)), sellers, draws=300))

    assert width(20000) < width(100) <= 30


def test_intervals_hold_for_all_ranks_at_once_as_often_as_stated() -> None:
    value, error, generator = torch.tensor([0.0, 0.5, 1.0, 1.2, 3.0]), 0.3, torch.Generator().manual_seed(0)
    true = [int((value > v).sum()) + 1 for v in value]
    held = 0
    for _ in range(300):
        seen = value + error * torch.randn(5, generator=generator)
        sample = seen[:, None] + error * torch.randn(5, 400, generator=generator)
        low, high = r.rank_intervals(seen, sample, 0.9)
        held += all(a <= t <= b for a, t, b in zip(low, true, high, strict=True))
    # at least 90 %, less three standard deviations of a count of 300
    assert held >= 300 * 0.9 - 3 * math.sqrt(300 * 0.09)
    assert low != high


def test_what_cannot_be_ranked_is_a_sentence() -> None:
    buyer = along(rows(100, 0))
    for sellers, kwargs, sentence in [
        ({}, {}, "at least one seller"),
        ({"a": buyer}, {"by": "price"}, "one of relevance, diversity, volume, .*, got 'price'"),
        ({"a": buyer}, {"confidence": 1.0}, "confidence must be in"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            r.rank(buyer, sellers, **kwargs)
    for kwargs, sentence in [
        ({"budget": -1}, "budget must not be negative"),
        ({"budget": 1, "prices": {"a": 0}}, "price of 'a' must be positive"),
        ({"budget": 1, "prices": {}}, "price of 'a' must be given"),
        ({"budget": 1, "rows": {"a": math.nan}}, "rows of 'a' must be"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            r.portfolio(buyer, {"a": buyer}, **kwargs)


def half(first: bool, seed: int) -> Moments:
    """A seller whose rows vary little in three of the buyer's six directions."""
    spread = torch.ones(D)
    spread[slice(3, 6) if first else slice(0, 3)] = 0.1 if first else 0.2
    return along(rows(2000, seed, spread))


def test_a_portfolio_takes_what_complements_and_not_two_of_a_kind() -> None:
    buyer, second = along(rows(2000, 0, torch.ones(D))), half(False, 3)
    sellers = {"first": half(True, 1), "second": second, "copy": second}
    alone = {name: r.portfolio(buyer, {name: s}, budget=1).value for name, s in sellers.items()}
    assert min(alone, key=alone.get) == "first"  # one by one, two of a kind would have been bought
    assert sorted(r.portfolio(buyer, sellers, budget=2).sellers) == ["first", "second"]


def test_a_copy_is_worth_less_than_the_first_and_noise_less_than_the_real() -> None:
    buyer, seller = along(rows(300, 0)), along(rows(300, 1))
    found = r.portfolio(buyer, {"a": seller, "b": seller}, budget=2)
    assert found.gains[1] < 0.8 * found.gains[0]
    noise = along(rows(300, 2, torch.full((D,), 10.0)))
    one, other = (r.portfolio(buyer, {"x": s}, budget=1).value for s in (seller, noise))
    assert other < 0.7 * one


def value_of(buyer: Moments, sellers: list[Moments]) -> float:
    own = shares(buyer)
    kept = kept_directions(own)
    total = torch.eye(int(kept.sum()), dtype=torch.float64)
    for s in sellers:
        weight = r.CREDIT * float(relevance(overlaps(own, shares(s), kept), weights(own, kept)))
        total = total + weight * r._capped(relative_covariance(side(buyer), side(s), kept))
    return float(torch.logdet(total))


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0, 4), st.booleans())
def test_greedy_keeps_its_guarantee_and_its_bound(seed: int, count: int, budget: float, equal: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    buyer = along(rows(200, 0))
    sellers = {str(i): along(rows(60, seed + i, torch.rand(D, generator=generator) ** 3)) for i in range(count)}
    prices = {name: 1.0 if equal else 0.2 + 2 * float(torch.rand((), generator=generator)) for name in sellers}
    found = r.portfolio(buyer, sellers, budget=budget, prices=prices)
    best = max(
        value_of(buyer, [sellers[name] for name in names])
        for size in range(count + 1)
        for names in itertools.combinations(sellers, size)
        if sum(prices[name] for name in names) <= budget * (1 + 1e-12)
    )
    assert found.cost <= budget * (1 + 1e-9)
    assert found.value == pytest.approx(value_of(buyer, [sellers[name] for name in found.sellers]), abs=1e-9)
    assert found.value >= (1 - 1 / math.e) / (1 if equal else 2) * best - 1e-9
    assert found.value - 1e-9 <= best <= found.at_most + 1e-9


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_the_value_grows_with_every_seller_and_by_less_and_less(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    buyer = along(rows(200, 0))
    a, b, c = (along(rows(60, seed + i, torch.rand(D, generator=generator) ** 2)) for i in range(3))
    alone, after = value_of(buyer, [a, c]) - value_of(buyer, [a]), value_of(buyer, [a, b, c]) - value_of(buyer, [a, b])
    assert -1e-9 <= after <= alone + 1e-9


def test_trusted_rows_count() -> None:
    buyer, sellers = along(rows(300, 0)), {"a": along(rows(300, 1)), "b": along(rows(300, 2))}
    assert r.portfolio(buyer, sellers, budget=1, rows={"a": 1.0, "b": 50.0}).sellers == ("b",)
    assert r.portfolio(buyer, sellers, budget=1, rows={"a": 50.0, "b": 1.0}).sellers == ("a",)


@pytest.mark.parametrize("by", MEASURES)
def test_sellers_can_be_ranked_by_every_measure(by: str) -> None:
    sellers = {str(i): along(rows(300, i + 1, SPREAD ** (1 + 0.4 * i))) for i in range(4)}
    found = r.rank(along(rows(300, 0)), sellers, by=by, draws=100)
    values = [x.scores[by].value for x in found]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 4
    assert all(x.scores[by].standard_error > 0 for x in found)
    assert (found[0].relevance, found[0].diversity, found[0].volume) == tuple(
        found[0].scores[m] for m in ("relevance", "diversity", "volume")
    )


def test_ranks_of_real_samples_lie_in_their_intervals_and_these_are_not_idle() -> None:
    spreads = [SPREAD ** (1 + 0.4 * i) for i in range(5)]
    truth = [along(rows(50_000, 50 + i, s)) for i, s in enumerate(spreads)]
    held = width = 0
    for trial in range(40):
        buyer = along(rows(200, 1000 + trial))
        sellers = {str(i): along(rows(300, 2000 + 10 * trial + i, s)) for i, s in enumerate(spreads)}
        found = {x.seller: x for x in r.rank(buyer, sellers, confidence=0.9, draws=150)}
        true = {x.seller: x.rank for x in r.rank(buyer, {str(i): m for i, m in enumerate(truth)}, draws=2)}
        held += all(found[s].rank_low <= true[s] <= found[s].rank_high for s in found)
        width += sum(x.rank_high - x.rank_low for x in found.values())
    # at least 90 %, less three standard deviations of a count of 40
    assert held >= 40 * 0.9 - 3 * math.sqrt(40 * 0.09)
    assert width < 40 * 10  # of 20, where nothing is told apart


def test_many_directions_and_many_sellers_take_bounded_memory(monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(r, "MOST_DRAWN", 6 * 6 * 50)
    monkeypatch.setattr(r, "draw", lambda m, draws, g, real=r.draw: drawn.append(draws) or real(m, draws, g))
    r.rank(along(rows(300, 0)), {"a": along(rows(300, 1)), "b": along(rows(300, 2))})
    assert drawn == [50, 50, 50]


def test_a_seller_of_other_directions_is_named() -> None:
    with pytest.raises(ValueError, match="'b' must have the buyer's 6 directions, got 5"):
        r.rank(along(rows(100, 0)), {"a": along(rows(100, 1)), "b": along(rows(100, 1), 5)})


def test_a_seller_that_adds_nothing_is_not_bought() -> None:
    buyer = along(rows(300, 0))
    nothing = torch.zeros(300, D)
    nothing[:, D - 1] = torch.randn(300, generator=torch.Generator().manual_seed(0))  # outside the directions
    found = r.portfolio(buyer, {"nothing": along(nothing), "a": along(rows(300, 1))}, budget=2)
    assert (found.sellers, found.cost) == (("a",), 1)


def test_a_budget_that_is_just_the_price_buys_in_spite_of_rounding() -> None:
    buyer, seller = along(rows(300, 0)), along(rows(300, 1))
    found = r.portfolio(buyer, {"a": seller}, budget=0.3, prices={"a": 0.1 + 0.2})
    assert found.sellers == ("a",)
    assert found.value == found.at_most


def test_cheap_sellers_that_are_more_together_are_bought_in_place_of_one_that_is_dear() -> None:
    def along_two(first: int, seed: int) -> Moments:
        spread = torch.full((D,), 0.1)
        spread[first : first + 2] = 1
        return along(rows(2000, seed, spread))

    buyer = along(rows(2000, 0, torch.ones(D)))
    sellers = {"dear": half(True, 1), "a": along_two(0, 2), "b": along_two(2, 3), "c": along_two(4, 4)}
    prices = {"dear": 3.0, "a": 1.0, "b": 1.0, "c": 1.0}
    alone = {name: r.portfolio(buyer, {name: s}, budget=3, prices=prices).value for name, s in sellers.items()}
    assert max(alone, key=alone.get) == "dear"  # by gain alone it would be bought, and nothing else
    assert set(r.portfolio(buyer, sellers, budget=3, prices=prices).sellers) == {"a", "b", "c"}
    # and one that is dear and worth it is not passed over for a cheap one that leaves no money for it
    assert r.portfolio(buyer, sellers, budget=3, prices=prices | {"b": 2.5, "c": 2.5}).sellers == ("dear",)


def test_nobody_counts_for_more_than_the_buyers_own_spread() -> None:
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    given_, expected = (torch.tensor(x, dtype=torch.float64) for x in ([5.0, 0.5, -0.2], [1.0, 0.5, 0.0]))
    torch.testing.assert_close(r._capped(turn @ torch.diag(given_) @ turn.T), turn @ torch.diag(expected) @ turn.T)


def test_the_bound_counts_parts_of_what_the_budget_does_not_reach() -> None:
    buyer, seller = along(rows(300, 0)), along(rows(300, 1))
    sellers = dict.fromkeys("abc", seller)
    first, second = r.portfolio(buyer, sellers, budget=2).gains
    assert r.portfolio(buyer, sellers, budget=1.5).at_most == pytest.approx(first + 1.5 * second)

"""Ranks with confidence intervals, and portfolios: which sellers to buy together for a budget. (ours)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from federated.arguments import positive, share
from federated.market.measures import (
    MEASURES,
    THRESHOLD,
    compared,
    measure_of,
    overlaps,
    relative_covariance,
    relevance,
    shares,
    side,
)
from federated.market.moments import Moments
from federated.market.score import Score, draw
from sgc.checks import rate, whole

ROUNDING = 1e-12  # of prices and budgets, relative; a smaller gain counts as none
CREDIT = 10.0  # rows a seller is credited with, over the buyer's: the more, the less a second of a kind is worth
MOST_DRAWN = 1 << 24  # numbers that one side's draws may have, for memory's sake


@dataclass(frozen=True)
class Ranked:
    """A seller's place among the others."""

    seller: str
    rank: int
    rank_low: int  # the best and the worst rank that the data do not contradict
    rank_high: int
    scores: dict[str, Score]  # by every measure
    rows: int

    @property
    def relevance(self) -> Score:
        """Its relevance."""
        return self.scores["relevance"]

    @property
    def diversity(self) -> Score:
        """Its diversity."""
        return self.scores["diversity"]

    @property
    def volume(self) -> Score:
        """How much of the buyer's space it covers, at most 0."""
        return self.scores["volume"]


def rank(
    buyer: Moments,
    sellers: Mapping[str, Moments],
    *,
    by: str = "relevance",
    confidence: float = 0.95,
    threshold: float = THRESHOLD,
    draws: int = 1000,
    seed: int = 0,
) -> list[Ranked]:
    """Rank sellers, best first, with ranks' confidence intervals that hold for all sellers at once.

    A rank's interval comes from pairs: a seller is at best behind all that are better beyond doubt, and at worst before
    all that are worse beyond doubt; doubt is judged by the largest studentised difference over all pairs in a
    parametric bootstrap (Mogstad, Romano, Shaikh, Wilhelm, Review of Economic Studies 2024). The buyer's draws are the
    same for every seller, so what its own sampling does to all of them alike is no doubt about their order.

    Args:
        buyer: along the directions.
        sellers: name → moments along the same.
        by: the name of a measure in `measures.MEASURES`.
        confidence: that all intervals hold at once.
        threshold: relative to the buyer's largest variance.
        draws: of the bootstrap, fewer where a query of very many directions would make them fill the memory.
        seed: of the draws.

    Raises:
        ValueError: no seller, an unknown measure, a confidence outside (0, 1), or a seller of other directions.
    """
    if not sellers:
        raise ValueError("at least one seller is needed to rank, got 0")
    measure_of(by)
    share("confidence", confidence, least=False)
    threshold = rate("threshold", threshold)
    draws, seed = whole("draws", draws, at_least=2), whole("seed", seed, at_least=0)
    for name, seller in sellers.items():
        if len(seller.mean) != len(buyer.mean):
            raise ValueError(f"{name!r} must have the buyer's {len(buyer.mean)} directions, got {len(seller.mean)}")
    generator = torch.Generator().manual_seed(seed)
    kept, weight = compared(shares(buyer), threshold)
    draws = min(draws, max(2, MOST_DRAWN // len(buyer.mean) ** 2))
    drawn = draw(buyer, draws, generator)
    exact, sample = [], []
    for seller in sellers.values():
        other = draw(seller, draws, generator)
        exact.append({name: measure(side(buyer), side(seller), kept, weight) for name, measure in MEASURES.items()})
        sample.append({name: measure(drawn, other, kept, weight) for name, measure in MEASURES.items()})
    value = torch.stack([found[by] for found in exact])
    low, high = rank_intervals(value, torch.stack([found[by] for found in sample]), confidence)
    ranked = [
        Ranked(
            name,
            int((value > value[j]).sum()) + 1,
            low[j],
            high[j],
            {m: Score(float(exact[j][m]), float(sample[j][m].std())) for m in MEASURES},
            seller.rows,
        )
        for j, (name, seller) in enumerate(sellers.items())
    ]
    return sorted(ranked, key=lambda r: r.rank)


def rank_intervals(value: Tensor, sample: Tensor, confidence: float) -> tuple[list[int], list[int]]:
    """Return the best and the worst rank of each that the data do not contradict, for all at once.

    Args:
        value: (J,) scores, more is better.
        sample: (J, draws) the bootstrap's.
        confidence: of all together.
    """
    centred = sample - sample.mean(1, keepdim=True)
    tiny = torch.finfo(sample.dtype).eps
    error, largest = torch.empty(len(value), len(value), dtype=sample.dtype), torch.zeros_like(sample[0])
    for j, row in enumerate(centred):  # pair by pair would take sellers² × draws numbers
        spread = row - centred
        error[j] = spread.std(1).clamp_min(tiny)
        largest = torch.maximum(largest, (spread.abs() / error[j, :, None]).amax(0))
    critical = torch.quantile(largest, confidence)
    better = value[:, None] - value[None] > critical * error  # better[j, k]: j before k beyond doubt
    low, high = better.sum(0) + 1, len(value) - better.sum(1)
    return low.tolist(), high.tolist()


@dataclass(frozen=True)
class Portfolio:
    """What to buy, in the order of choice."""

    sellers: tuple[str, ...]
    gains: tuple[float, ...]  # what each added
    value: float
    cost: float
    at_most: float  # no set of sellers within the budget has a higher value


def portfolio(
    buyer: Moments,
    sellers: Mapping[str, Moments],
    *,
    budget: float,
    prices: Mapping[str, float] | None = None,
    rows: Mapping[str, float] | None = None,
    threshold: float = THRESHOLD,
) -> Portfolio:
    """Choose sellers for a budget by relevance and joint diversity.

    The value of a set S is F(S) = log det(I + Σ_{s∈S} w_s·ρ_s·M_s): the information that S adds to the buyer's own
    rows, on the scale of the buyer's covariance (D-optimal design). M_s is the seller's covariance relative to the
    buyer's, eigenvalues cut at 1, so that nobody counts for more than the buyer's own spread; ρ_s is its relevance. F
    grows with every seller and by less the more there is of the same kind (it is submodular), so a second copy of a
    seller is worth less than the first.

    Bought greedily, by gain and by gain per price, the better of the two: at least 1 − 1/e of the best set for equal
    prices (Nemhauser, Wolsey, Fisher 1978), half of that for any (Khuller, Moss, Naor 1999). `at_most` bounds the best
    set for the case at hand, which is usually much tighter.

    Args:
        buyer: along the directions.
        sellers: name → moments along the same.
        budget: of the sum of prices.
        prices: positive; 1 for each seller by default.
        rows: w_s, rows to credit a seller with, over the buyer's. By default all have the same, 10, because a number
            of rows is a claim that copies of rows can raise.
        threshold: relative to the buyer's largest variance.

    Raises:
        ValueError: a price or a credit that is not positive, or a budget that is negative.
    """
    prices = dict.fromkeys(sellers, 1.0) if prices is None else prices
    rows = dict.fromkeys(sellers, CREDIT) if rows is None else rows
    for name in sellers:
        for kind, given in (("price", prices), ("rows", rows)):
            if name not in given:
                raise ValueError(f"the {kind} of {name!r} must be given")
            positive(f"the {kind} of {name!r}", given[name])
    budget, threshold = rate("budget", budget), rate("threshold", threshold)
    own = shares(buyer)
    kept, weight = compared(own, threshold)
    information = {
        name: rows[name]
        * float(relevance(overlaps(own, shares(s), kept), weight))
        * _capped(relative_covariance(side(buyer), side(s), kept))
        for name, s in sellers.items()
    }
    found = [_greedy(information, prices, budget, per_price) for per_price in (False, True)]
    return max(found, key=lambda p: p.value)


def _capped(relative: Tensor) -> Tensor:
    """Cut the eigenvalues of a symmetric matrix to [0, 1]."""
    value, vector = torch.linalg.eigh(relative)
    return (vector * value.clamp(0, 1)) @ vector.T


def _greedy(information: dict[str, Tensor], prices: Mapping[str, float], budget: float, per_price: bool) -> Portfolio:
    chosen: list[str] = []
    gains: list[float] = []
    left = budget
    total = torch.eye(len(next(iter(information.values()))), dtype=torch.float64) if information else torch.eye(1)
    while True:
        now = float(torch.logdet(total))
        gain = {
            name: float(torch.logdet(total + part)) - now for name, part in information.items() if name not in chosen
        }
        within = [name for name in gain if prices[name] <= left * (1 + ROUNDING) and gain[name] > ROUNDING]
        if not within:
            break
        best = max(within, key=lambda name: gain[name] / (prices[name] if per_price else 1))
        chosen.append(best)
        gains.append(gain[best])
        total = total + information[best]
        left -= prices[best]
    value = sum(gains)
    return Portfolio(tuple(chosen), tuple(gains), value, budget - left, value + _knapsack(gain, prices, budget))


def _knapsack(gain: dict[str, float], prices: Mapping[str, float], budget: float) -> float:
    """Bound what gains can add up to within a budget, as if parts could be bought; gains only shrink later."""
    total = 0.0
    for name in sorted(
        (n for n in gain if prices[n] <= budget * (1 + ROUNDING)), key=lambda n: gain[n] / prices[n], reverse=True
    ):
        part = min(1.0, budget / prices[name])
        total += part * gain[name]
        budget -= part * prices[name]
        if budget <= 0:
            break
    return total

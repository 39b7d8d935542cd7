"""Choosing among many combinations: every pair of values at least once."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]


def every(factors: Mapping[str, Sequence[Any]], possible: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """List all possible combinations of the values of some factors."""
    cases = (dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values()))
    return [case for case in cases if possible(case)]


def pairwise(factors: Mapping[str, Sequence[Any]], possible: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """Choose combinations, greedily, until every possible pair of values of two factors is in one of them."""
    cases = every(factors, possible)
    pairs = [set(itertools.combinations(case.items(), 2)) for case in cases]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(cases)), key=lambda number: len(pairs[number] & missing))
        chosen.append(cases[best])
        missing -= pairs[best]
    return chosen


def named(case: Case) -> str:
    """Name a case in a test's id."""
    return " ".join(str(value).removeprefix("torch.") for value in case.values())

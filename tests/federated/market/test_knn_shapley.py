"""The KNN-Shapley values that the benchmark compares with are Shapley values."""

import itertools
import math

import numpy as np
import pytest
import torch

from benchmarks.market import knn_shapley


def utility(members: tuple[int, ...], distance: np.ndarray, match: np.ndarray, k: int) -> float:
    """What a K-nearest-neighbour vote of some rows gives the right class, a missing neighbour giving none."""
    nearest = sorted(members, key=lambda i: distance[i])[:k]
    return sum(match[i] for i in nearest) / k


@pytest.mark.parametrize("k", [1, 2, 5])
def test_knn_shapley_is_the_mean_marginal_gain_over_all_orders(k: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((6, 2)).astype(np.float32), rng.integers(0, 2, 6)
    test, labels = rng.standard_normal((3, 2)).astype(np.float32), rng.integers(0, 2, 3)
    expected = np.zeros(6)
    for point, label in zip(test, labels, strict=True):
        distance, match = np.linalg.norm(x - point, axis=1), (y == label).astype(float)
        for order in itertools.permutations(range(6)):
            for at, i in enumerate(order):
                gain = utility(order[: at + 1], distance, match, k) - utility(order[:at], distance, match, k)
                expected[i] += gain / math.factorial(6) / len(test)
    each = [torch.from_numpy(row[None]) for row in x]
    got = knn_shapley(torch.from_numpy(test), labels, each, [y[i : i + 1] for i in range(6)], k)
    assert got == pytest.approx(list(expected), abs=1e-9)

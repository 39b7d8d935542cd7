"""The `evaluate` measurements open without a network and give what the functions give."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from federated.market import score
from federated.market.fingerprint import Encoder
from federated.market.query import answer, make_query

METRICS = Path(__file__).resolve().parents[3] / "recipes" / "metrics"
ENCODER = Encoder("vectors", "0" * 64, "none", False, 24)


def rows(n: int, seed: int) -> np.ndarray:
    spread = np.exp(-np.linspace(0, 3, 24))
    return (np.random.default_rng(seed).standard_normal((n, 24)) * spread + 0.3).astype(np.float32)


@pytest.mark.parametrize("name", ["relevance", "diversity"])
def test_a_measurement_is_the_function_of_its_name(name: str) -> None:
    measurement = evaluate.load(str(METRICS / f"seller_{name}"), module_type="measurement")
    buyer, seller = rows(100, 0), rows(300, 1)
    query, key = make_query(torch.from_numpy(buyer), ENCODER, decoys=0)
    moments = key.seller(answer(query, [torch.from_numpy(seller)], ENCODER, "s"))
    expected = score.score(key.buyer(), moments, name)
    got = measurement.compute(data=seller, buyer=buyer)
    assert got[f"seller_{name}"] == pytest.approx(expected.value, abs=1e-5)
    assert got["standard_error"] == pytest.approx(expected.standard_error, rel=0.3)
    for row in seller[:100]:
        measurement.add(data=row)
    measurement.add_batch(data=seller[100:])
    piecewise = measurement.compute(buyer=buyer)
    assert piecewise[f"seller_{name}"] == pytest.approx(expected.value, abs=1e-5)


def test_what_is_missing_is_a_sentence() -> None:
    measurement = evaluate.load(str(METRICS / "seller_relevance"), module_type="measurement")
    with pytest.raises(ValueError, match="buyer's vectors must be given"):
        measurement.compute(data=rows(100, 0))
    with pytest.raises(ValueError, match="at least 40 rows"):
        measurement.compute(data=rows(100, 0), buyer=rows(30, 1))

"""The accounting is right, the sensitivity holds whatever the rows are, and the noise is as large as its formula."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from federated.market import privacy as p
from federated.market.fingerprint import Encoder
from federated.market.messages import BuyerQuery, SellerResponse
from federated.market.moments import Moments, moments_along
from federated.market.query import make_query, normal
from federated.market.score import score

UNIT = Encoder("unit", "0" * 64, "none", True, 24)
RAW = Encoder("raw", "0" * 64, "none", False, 24)


def rows(n: int, seed: int) -> torch.Tensor:
    x = torch.randn(n, 24, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0, 2, 24).neg().exp()
    return torch.nn.functional.normalize(x + 0.2, dim=1)


def released(moments: Moments, clip: float, known_energy: bool) -> torch.Tensor:
    """What is released, as one vector on the scale of unit sensitivity per part."""
    k = len(moments.mean)
    i, j = torch.triu_indices(k, k)
    weight = torch.where(i == j, 1.0, math.sqrt(2)).double()
    parts = [moments.mean / clip, moments.second[i, j] * weight / clip**2]
    return torch.cat(parts if known_energy else [*parts, torch.tensor([moments.energy / clip**2]).double()])


@given(st.floats(0.05, 8), st.floats(1e-8, 0.2))
def test_the_ratio_of_a_budget_is_the_largest_that_keeps_it(epsilon: float, delta: float) -> None:
    ratio = p.gaussian_ratio(epsilon, delta)
    assert p.gaussian_delta(epsilon, ratio) <= delta < p.gaussian_delta(epsilon, ratio * (1 + 1e-6))
    assert p.gaussian_epsilon(delta, ratio) == pytest.approx(epsilon, rel=1e-6)


def test_delta_is_the_hockey_stick_divergence_of_two_normals() -> None:
    for epsilon, ratio in [(0.5, 0.3), (1.0, 1.0), (3.0, 2.0)]:
        x = torch.linspace(-15, 15, 2_000_001, dtype=torch.float64)
        normal = torch.distributions.Normal(torch.tensor(0.0).double(), 1.0)
        density, moved = normal.log_prob(x).exp(), normal.log_prob(x - ratio).exp()
        integral = float(torch.trapezoid((moved - math.exp(epsilon) * density).clamp_min(0), x))
        assert p.gaussian_delta(epsilon, ratio) == pytest.approx(integral, rel=1e-5)


def test_less_noise_is_needed_than_by_the_classical_formula() -> None:
    for epsilon in (0.1, 0.5, 1.0):
        classical = epsilon / math.sqrt(2 * math.log(1.25 / 1e-6))
        assert classical < p.gaussian_ratio(epsilon, 1e-6) < 2 * classical


@pytest.mark.parametrize("huge", [1.0, 1e6, 1e30])
@pytest.mark.parametrize("known_energy", [True, False])
def test_replacing_any_row_moves_the_answer_by_at_most_the_sensitivity(huge: float, known_energy: bool) -> None:
    clip, n = 1.0 if known_energy else 0.7, 12
    v = torch.linalg.qr(torch.randn(24, 5, generator=torch.Generator().manual_seed(0))).Q
    worst = 0.0
    for seed in range(40):
        x, neighbour = rows(n, seed), rows(n, seed)
        one, other = v[:, seed % 5], v[:, (seed + 1) % 5]
        x[0] = one * huge
        cosine = [-1.0, -0.5, 0.0, 0.7][seed % 4]  # of the row that comes instead, or none at all
        neighbour[0] = (cosine * one + math.sqrt(1 - cosine**2) * other) * huge * (seed % 5 > 0)
        a, b = (
            released(moments_along(next(p.clipped([side], clip)), v), clip, known_energy) for side in (x, neighbour)
        )
        worst = max(worst, float((a - b).norm()))
    bound = p.SENSITIVITY / n
    assert 0.99 * bound < worst <= bound * (1 + 1e-5)  # nor is it loose


def test_the_noise_is_as_large_as_its_formula_and_does_not_look_at_the_data() -> None:
    n, clip, ratio, k = 200, 0.5, 0.8, 5
    v = torch.eye(24)[:, :k]
    generator = torch.Generator().manual_seed(0)
    for x in (rows(n, 0), torch.zeros(n, 24)):
        moments = moments_along(next(p.clipped([x], clip)), v)
        noisy = [p.add_noise(moments, clip, ratio, known_energy=False, generator=generator) for _ in range(2000)]
        clean = released(moments, clip, False)
        spread = torch.stack([released(m, clip, False) - clean for m in noisy])[:, :-1]  # the energy is held positive
        scale = 3 / math.sqrt(2) / n / ratio
        # 2000 draws of each of 20 numbers know a standard deviation to 1/√4000 = 1.6 %; 4.9 of those
        torch.testing.assert_close(spread.std(0), torch.full((20,), scale).double(), rtol=0.078, atol=0)
        assert noisy[0].mean_noise == pytest.approx(scale * clip)
        assert noisy[0].second_noise == pytest.approx(scale * clip**2)
        assert torch.equal(noisy[0].second, noisy[0].second.T)


def test_an_answer_with_noise_scores_as_one_without_once_there_are_rows_enough(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(p, "normal", lambda *shape, **_: normal(*shape, generator=generator))
    query, key = make_query(rows(200, 0), UNIT, directions=4, decoys=2, seed=0)
    x = rows(50_000, 1)
    plain = score(key.buyer(), key.seller(SellerResponse(query.identifier, "s", moments_along(x, query.directions))))
    found = []
    for epsilon in (1.0, 0.05):
        response = p.private_answer(query, x.split(1000), UNIT, "s", epsilon=epsilon, delta=1e-6)
        assert response.moments.energy == 1.0
        assert (response.epsilon, response.delta) == (epsilon, 1e-6)
        found.append(score(key.buyer(), key.seller(response)))
    assert found[0].value == pytest.approx(plain.value, abs=0.02)
    assert found[0].standard_error < found[1].standard_error


def test_two_answers_have_different_noise() -> None:
    query = make_query(rows(100, 0), UNIT, directions=3, decoys=2)[0]
    one, two = (p.private_answer(query, [rows(100, 1)], UNIT, "s", epsilon=1, delta=1e-6) for _ in range(2))
    assert not torch.equal(one.moments.mean, two.moments.mean)


def test_the_ledger_adds_up_as_gaussian_mechanisms_do_and_refuses_what_exceeds_it(tmp_path) -> None:
    ledger = p.Ledger(tmp_path / "ledger.json", epsilon=1.0, delta=1e-6)
    whole = p.gaussian_ratio(1.0, 1e-6)
    for i in range(1, 5):  # four answers of half the ratio are one of the whole
        ledger.charge(whole / 2)
        assert ledger.spent() == pytest.approx(p.gaussian_epsilon(1e-6, whole / 2 * math.sqrt(i)))
    assert ledger.spent() == pytest.approx(1.0, rel=1e-6)
    again = p.Ledger(tmp_path / "ledger.json", epsilon=1.0, delta=1e-6)
    with pytest.raises(ValueError, match="budget of epsilon=1.0 .* would be exceeded"):
        again.charge(whole / 100)
    assert again.spent() == ledger.spent()


def test_a_refused_answer_costs_nothing_and_an_answered_one_its_price(tmp_path) -> None:
    query = make_query(rows(100, 0), UNIT, directions=3, decoys=2)[0]
    ledger = p.Ledger(tmp_path / "deep" / "ledger.json", epsilon=2.0, delta=1e-6)
    with pytest.raises(ValueError, match="at least 24 rows"):
        p.private_answer(query, [rows(5, 1)], UNIT, "s", epsilon=1, delta=1e-6, ledger=ledger)
    assert ledger.spent() == 0
    p.private_answer(query, [rows(100, 1)], UNIT, "s", epsilon=1, delta=1e-6, ledger=ledger)
    assert ledger.spent() == pytest.approx(1.0, rel=1e-6)
    (tmp_path / "deep" / "ledger.json").write_text('{"ratios": [-1]}')
    with pytest.raises(ValueError, match="list 'ratios' of positive numbers"):
        p.Ledger(tmp_path / "deep" / "ledger.json", epsilon=2.0, delta=1e-6)


def test_budgets_and_clips_that_make_no_sense_are_a_sentence() -> None:
    query = make_query(rows(100, 0), UNIT, directions=3, decoys=2)[0]
    for kwargs, sentence in [
        ({"epsilon": 0, "delta": 1e-6}, "epsilon must be positive"),
        ({"epsilon": math.inf, "delta": 1e-6}, "epsilon must be positive"),
        ({"epsilon": 1, "delta": 0}, "delta must be in"),
        ({"epsilon": 1, "delta": 1e-6, "clip": math.nan}, "clip must be positive"),
        ({"epsilon": 1, "delta": 1e-6, "clip": 2.0}, "clip must be 1 where the encoder"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            p.private_answer(query, [rows(100, 1)], UNIT, "s", **kwargs)


def test_rows_that_are_not_finite_are_refused_and_not_clipped() -> None:
    query = make_query(rows(100, 0), RAW, directions=3, decoys=2)[0]
    bad = rows(100, 1)
    bad[4, 0] = math.inf
    with pytest.raises(ValueError, match="row 4"):
        p.private_answer(query, [bad], RAW, "s", epsilon=1, delta=1e-6, clip=1.0)


def test_noise_comes_from_the_system_and_not_from_a_seed_that_can_be_guessed(monkeypatch) -> None:
    import os

    asked = []
    monkeypatch.setattr(os, "urandom", lambda n, real=os.urandom: asked.append(n) or real(n))
    query = make_query(rows(100, 0), RAW, directions=3, decoys=2)[0]  # 2 random directions, 6 × 6 of rotation
    assert sum(asked) == 8 * (24 * 2 + 6 * 6)
    asked.clear()
    p.private_answer(query, [rows(100, 1)], RAW, "s", epsilon=1, delta=1e-6)
    assert sum(asked) == 8 * (6 + 6 * 6 + 1)


def test_the_systems_normal_numbers_are_normal() -> None:
    x = normal(200, 500)
    assert torch.isfinite(x).all()
    for at in (-2.0, -0.5, 0.0, 1.0, 3.0):
        share, expected = float((x < at).double().mean()), p._normal_cdf(at)
        assert share == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / 1e5))
    assert float((x[:, 1:] * x[:, :-1]).mean()) == pytest.approx(0, abs=5 / math.sqrt(1e5))
    assert not torch.equal(normal(5), normal(5))
    assert normal(0, 3).shape == (0, 3)


@pytest.mark.parametrize("extreme", [0, (1 << 64) - 1])
def test_no_bits_make_an_infinite_number(monkeypatch, extreme: int) -> None:
    import os

    signed = extreme ^ (1 << 63)  # the least and the greatest of signed numbers
    monkeypatch.setattr(os, "urandom", lambda n: signed.to_bytes(8, "little") * (n // 8))
    assert torch.isfinite(normal(3)).all()
    assert float(normal(1).abs()) > 8


def test_a_basis_that_is_longer_than_orthonormal_within_rounding_gets_more_noise() -> None:
    query = make_query(rows(100, 0), UNIT, directions=3, decoys=2)[0]
    longer = BuyerQuery(query.directions * 1.00004, UNIT)
    scales = [
        p.private_answer(q, [rows(100, 1)], UNIT, "s", epsilon=1, delta=1e-6).moments.mean_noise
        for q in (query, longer)
    ]
    assert scales[1] / scales[0] == pytest.approx(1.00004**2, rel=1e-6)


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 1)), min_size=2, max_size=2))
def test_the_sensitivity_holds_for_any_two_rows_along_two_directions(pair) -> None:
    f = []
    for x, y, outside in pair:
        row = torch.tensor([x, y, outside], dtype=torch.float64)
        row = row / row.norm().clamp_min(1)
        m = Moments(2, row[:2], torch.outer(row[:2], row[:2]), float(row.square().sum()), row[:2])
        f.append(released(m, 1.0, False))
    assert float((f[0] - f[1]).norm()) <= p.SENSITIVITY * (1 + 1e-12)


def test_the_noise_that_the_docs_promise_is_the_noise_that_is_added() -> None:
    docs = Path(__file__).resolve().parents[3] / "docs" / "market.md"
    table = docs.read_text(encoding="utf-8").split("| rows | ε = 1 | ε = 5 |\n")[1].split("\n\n")[0].splitlines()[1:]
    assert len(table) == 3
    for line in table:
        count, *stated = (float(cell.replace(",", "")) for cell in line.strip("|").split("|"))
        for epsilon, noise in zip((1, 5), stated, strict=True):
            exact = p.noise_scales(int(count), 1.0, p.gaussian_ratio(epsilon, 1e-6))[1]
            assert noise == pytest.approx(exact, rel=0.03)


def test_stated_errors_of_a_noisy_answer_are_those_of_normal_rows() -> None:
    m = moments_along(rows(400, 1), torch.eye(24)[:, :4])
    noisy = p.add_noise(m, 1.0, 2.0, known_energy=True, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(noisy.variance_se, noisy.variance * math.sqrt(2 / 400))
    assert noisy.energy_se == 0
    assert p.add_noise(m, 1.0, 2.0, known_energy=False).energy_se == noisy.second_noise

"""What travels is what it says, gives away no more, and is safe to open from a stranger."""

import json
import math
import os
import pickle
import stat
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from federated.market import messages, untrusted
from federated.market import query as q
from federated.market.moments import moments_along
from federated.market.rank import rank
from federated.market.score import score
from federated.market.untrusted import read_tensors

ENCODER = q.Encoder("pixels", "0" * 64, "none", False, 32)


def rows(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 32, generator=generator) * torch.linspace(0, 3, 32).neg().exp() + 0.3


@pytest.fixture
def pair() -> tuple[q.BuyerQuery, q.BuyerKey]:
    return q.make_query(rows(100, 0), ENCODER, directions=6, decoys=4, seed=1)


def response_of(pair: tuple[q.BuyerQuery, q.BuyerKey], seed: int = 5, **changes) -> q.SellerResponse:
    return replace(q.answer(pair[0], rows(300, seed).split(64), ENCODER, "seller"), **changes)


def test_what_comes_back_is_what_the_true_directions_would_have_given(pair) -> None:
    query, key = pair
    seller, x = rows(300, 5), rows(100, 0).double()
    vectors, values = q.leading_eigenvectors(x - x.mean(0), 6)
    direct = moments_along(seller, vectors.float())
    turned = key.seller(q.answer(query, [seller], ENCODER, "s"))
    torch.testing.assert_close(turned.covariance[1:, 1:], direct.covariance, rtol=0, atol=1e-5)
    torch.testing.assert_close(key.buyer().variance[1:], values, rtol=1e-4, atol=1e-6)
    # the mean has no part outside the mean direction and the eigenvectors
    assert float(key.buyer().mean.square().sum()) == pytest.approx(float(x.mean(0).square().sum()), rel=1e-4)


def test_the_query_file_tells_neither_eigenvalue_nor_order_nor_decoy(pair, tmp_path) -> None:
    query, key = pair
    query.save(tmp_path / "q")
    x = rows(100, 0).double()
    vectors, values = q.leading_eigenvectors(x - x.mean(0), 6)
    alignment = (query.directions.double().T @ vectors).abs()
    assert alignment.max() < 0.95  # no column is an eigenvector
    content = (tmp_path / "q").read_bytes()
    for secret in [*values, *key.moments.variance, *x.mean(0)]:
        for dtype in ("<f4", "<f8"):
            assert secret.numpy().astype(dtype).tobytes() not in content
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert set(header) == {"__metadata__", "directions"}
    assert set(json.loads(header["__metadata__"]["sgc_market"])) == {"kind", "version", "encoder"}


def test_the_basis_is_turned_anew_each_time() -> None:
    one, two = (q.make_query(rows(100, 0), ENCODER, directions=6, decoys=4)[0] for _ in range(2))
    assert not torch.allclose(one.directions, two.directions)


def test_files_come_back_as_they_were(pair, tmp_path) -> None:
    query, key = pair
    response = response_of(pair)
    query.save(tmp_path / "q")
    key.save(tmp_path / "k")
    response.save(tmp_path / "r")
    again, key_again, response_again = (
        q.BuyerQuery.load(tmp_path / "q"),
        q.BuyerKey.load(tmp_path / "k"),
        q.SellerResponse.load(tmp_path / "r"),
    )
    assert torch.equal(again.directions, query.directions)
    assert again.encoder == query.encoder
    assert again.identifier == query.identifier == key_again.query
    assert response_again.to_json() == response.to_json()
    one, two = (score(k.buyer(), k.seller(r)) for k, r in ((key, response), (key_again, response_again)))
    assert one.value == pytest.approx(two.value, abs=1e-12)
    assert stat.S_IMODE(os.stat(tmp_path / "k").st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k", "q", "r"]


@pytest.mark.parametrize(
    ("field", "value"), [("digest", "1" * 64), ("pooling", "mean"), ("normalize", True), ("dimension", 31)]
)
def test_another_encoder_is_refused_by_the_field_that_differs(pair, field: str, value) -> None:
    with pytest.raises(ValueError, match=f"same encoder: the query's {field} is"):
        q.answer(pair[0], [rows(300, 5)], replace(ENCODER, **{field: value}), "s")


def test_what_a_query_cannot_be_made_of_is_a_sentence() -> None:
    bad = rows(100, 0)
    bad[7, 3] = float("nan")
    flat = rows(100, 0)
    flat[:, 2:] = 1.0
    for x, kwargs, sentence in [
        (rows(39, 0), {}, "needs at least 40 rows, or it would reveal single ones; got 39"),
        (rows(200, 0), {"directions": 25}, "must be below the dimension 32, got 25 \\+ 1 \\+ 8"),
        (rows(200, 0)[:, :31], {}, "encoder's dimension 32, got shape \\(200, 31\\)"),
        (rows(0, 0), {}, "got 0"),
        (bad, {}, "NaN or infinity in row 7"),
        (flat, {}, "must vary along 10 directions, got 2"),
        (torch.ones(100, 32), {}, "must vary along 10 directions, got 0"),
        (rows(100, 0), {"directions": 0}, "directions must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            q.make_query(x, ENCODER, **kwargs)


def test_what_a_seller_cannot_answer_with_is_a_sentence(pair) -> None:
    bad = rows(300, 0)
    bad[77] = float("inf")
    for batches, sentence in [
        ([rows(43, 0)], "at least 44 rows, or the answer would reveal single ones; got 43"),
        ([], "got 0"),
        ([torch.ones(300, 32)], "must vary along the query's directions, got constant"),
        ([rows(300, 0)[:, :31]], "query's dimension 32"),
        ([bad], "NaN or infinity in row 77"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            q.answer(pair[0], batches, ENCODER, "s")
    with pytest.raises(ValueError, match="printable"):
        q.answer(pair[0], [rows(300, 0)], ENCODER, "\x1b[2Jgone")


def test_an_answer_to_an_altered_query_is_known(pair) -> None:
    query, key = pair
    altered = q.BuyerQuery(query.directions.flip(1).contiguous(), ENCODER)
    with pytest.raises(ValueError, match="answers another query, or an altered one"):
        key.seller(q.answer(altered, [rows(300, 5)], ENCODER, "s"))


def test_directions_that_would_make_a_seller_tell_more_are_refused(pair) -> None:
    query = pair[0]
    for directions in (query.directions * 2, query.directions[:, [0, 0]], query.directions * float("nan")):
        with pytest.raises(ValueError, match="orthonormal"):
            q.BuyerQuery(directions.contiguous(), ENCODER)


def hostile_queries(pair) -> dict[str, bytes]:
    query = pair[0]
    header = {"kind": "query", "version": 1, "encoder": asdict(ENCODER)}

    def file(tensors=None, **changes) -> bytes:
        return save(tensors or {"directions": query.directions}, {"sgc_market": json.dumps(header | changes)})

    good = file()
    return {
        "empty": b"",
        "a pickle": pickle.dumps(os.getcwd),
        "a header of 2**60 bytes": (2**60).to_bytes(8, "little") + b"{}",
        "cut short": good[:-5],
        "a tail": good + b"x" * 5,
        "another kind": file(kind="response"),
        "a later version": file(version=2),
        "a version in words": file(version="1"),
        "one field more": file(eigenvalues=[1]),
        "no metadata": save({"directions": query.directions}),
        "metadata that is no JSON": save({"directions": query.directions}, {"sgc_market": "{"}),
        "metadata nested deep": save({"directions": query.directions}, {"sgc_market": "[" * 100_000}),
        "another tensor": file({"directions": query.directions, "more": torch.zeros(1)}),
        "float64": file({"directions": query.directions.double()}),
        "a vector": file({"directions": query.directions[:, 0].contiguous()}),
        "no columns": file({"directions": query.directions[:, :0].contiguous()}),
        "another dimension": file({"directions": query.directions[:31].contiguous()}),
        "NaN": file({"directions": query.directions * float("nan")}),
        "long columns": file({"directions": query.directions * 3}),
        "an encoder that paints the terminal": file(encoder=asdict(ENCODER) | {"name": "\x1b]0;x\x07"}),
        "an encoder of no digest": file(encoder=asdict(ENCODER) | {"digest": "../../etc/passwd"}),
        "a huge dimension": file(encoder=asdict(ENCODER) | {"dimension": 10**30}),
        "an encoder that is a list": file(encoder=[]),
    }


def test_hostile_queries_are_refused_with_a_sentence(pair, tmp_path) -> None:
    for name, content in hostile_queries(pair).items():
        path = tmp_path / "q"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"\w+ .*\w") as caught:
            q.BuyerQuery.load(path)
        assert str(caught.value).isprintable(), name
        assert len(str(caught.value)) < 400, name


def test_keys_that_are_damaged_are_refused_with_a_sentence(pair, tmp_path) -> None:
    query, key = pair
    key.save(tmp_path / "k")
    good = read_tensors((tmp_path / "k").read_bytes(), "key")
    for tensors, header in [
        ({"mean": torch.zeros(3).double()}, {}),
        ({"rotation": torch.zeros(2, 2).double()}, {}),
        ({}, {"rows": "100"}),
        ({}, {"decoys": 99}),
        ({}, {"energy": None}),
        ({}, {"query": "x"}),
        ({}, {"kind": "query"}),
    ]:
        content = save(good[0] | tensors, {"sgc_market": json.dumps(good[1] | header)})
        (tmp_path / "k").write_bytes(content)
        with pytest.raises(ValueError, match=r"\w+ .*\w"):
            q.BuyerKey.load(tmp_path / "k")
    query.save(tmp_path / "k")
    with pytest.raises(ValueError, match="must be a key, got 'query'"):
        q.BuyerKey.load(tmp_path / "k")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 1},
        {"rows": 1e3}, {"rows": True}, {"rows": 10**400}, {"rows": "300"}, {"energy": -1.0},
        {"energy": None},
        {"mean": []}, {"mean": [1.0]}, {"mean": ["1"] * 11}, {"mean": [[1.0]] * 11}, {"mean": [1e200] * 11},
        {"second": [[0.0] * 11]}, {"second": [[float(i) for i in range(11)]] * 11}, {"second": "x" * 100},
        {"variance_se": [-1.0] * 11}, {"seller": "\x1b[31m"}, {"seller": "x" * 65}, {"seller": ""}, {"query": "zz"},
        {"version": 2}, {"kind": "query"}, {"epsilon": "1"}, {"more": 1},
    ],
    ids=lambda change: str(change)[:40],
)  # fmt: skip
def test_hostile_responses_are_refused_with_a_sentence(pair, change: dict) -> None:
    record = json.loads(response_of(pair).to_json()) | change
    with pytest.raises(ValueError, match=r"\w+ .*\w") as caught:
        q.SellerResponse.from_json(json.dumps(record))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 1, "a": 2}', "[" * 100_000, '{"energy": NaN}', '{"energy": 1e999}', b"\xff\xfe\x00"]
)
def test_responses_that_are_no_json_object_are_refused(text) -> None:
    with pytest.raises(ValueError, match=r"\w+ .*\w"):
        q.SellerResponse.from_json(text)


def test_numbers_beyond_any_float_are_refused(pair) -> None:
    text = response_of(pair).to_json().replace('"energy": ', '"energy": 1e999, "was": ')
    with pytest.raises(ValueError, match="exactly the fields"):
        q.SellerResponse.from_json(text)
    record = json.loads(response_of(pair).to_json())
    for text in ("1e999", "NaN", "-Infinity"):
        changed = json.dumps(record | {"energy": "HERE"}).replace('"HERE"', text)
        with pytest.raises(ValueError, match="number"):
            q.SellerResponse.from_json(changed)


def test_a_file_is_judged_by_size_before_it_is_read(tmp_path) -> None:
    path = tmp_path / "big"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse
    for cls in (q.BuyerQuery, q.SellerResponse):
        with pytest.raises(ValueError, match="at most"):
            cls.load(path)
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nowhere", "."):
        with pytest.raises(ValueError, match="is no file"):
            q.SellerResponse.load(tmp_path / name)


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_raise_a_sentence(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w+ .*\w"):
        q.SellerResponse.from_json(data)


@given(st.data())
def test_a_query_with_bytes_changed_loads_as_a_query_or_not_at_all(data) -> None:
    import tempfile

    query = q.make_query(rows(100, 0), ENCODER, directions=3, decoys=2, seed=1)[0]
    with tempfile.TemporaryDirectory() as folder:
        query.save(f"{folder}/q")
        with open(f"{folder}/q", "r+b") as file:
            content = bytearray(file.read())
            for _ in range(data.draw(st.integers(1, 4))):
                content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
            file.seek(0)
            file.write(content)
        try:
            loaded = q.BuyerQuery.load(f"{folder}/q")
        except ValueError:
            return
        gram = loaded.directions.T @ loaded.directions
        assert (gram - torch.eye(6)).abs().max() <= messages.ORTHONORMAL


def test_more_rows_than_dimensions_give_the_same_eigenvectors_by_either_way() -> None:
    x = rows(200, 0).double()
    x = x - x.mean(0)
    vectors, values = q.leading_eigenvectors(x, 4)
    few, few_values = q.leading_eigenvectors(x[:100], 4)
    direct = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(values, direct.S[:4].square() / 200)
    torch.testing.assert_close((vectors.T @ direct.Vh[:4].T).abs(), torch.eye(4).double(), atol=1e-8, rtol=0)
    assert few.shape == (32, 4)
    assert len(few_values) == 4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"energy": 0.0}, "'energy' must be from 1e-60"),
        ({"energy": 1e-100}, "'energy' must be from 1e-60"),
        ({"energy": 1e100}, "'energy' must be from 1e-60"),
        ({"mean": [1e20] * 11}, "'mean' must be on the scale"),
        ({"second": [[1e20] * 11] * 11}, "'second' must be on the scale"),
        ({"variance_se": [1e20] * 11}, "'variance_se' must be on the scale"),
        ({"energy_se": 1e20}, "'energy_se' must be on the scale"),
        ({"second_noise": 1e20, "epsilon": 1.0, "delta": 1e-6}, "'second_noise' must be on the scale"),
        ({"mean_noise": 1e20, "epsilon": 1.0, "delta": 1e-6}, "'mean_noise' must be on the scale"),
        ({"mean_noise": 0.1, "second_noise": 0.1}, "noise must be stated with"),
        ({"mean_noise": 0.1, "epsilon": 1.0, "delta": 1e-6}, "noise must be stated with"),
        ({"epsilon": 1.0, "delta": 1e-6}, "noise must be stated with"),
        ({"epsilon": 1.0}, "must be a budget or both null"),
        ({"epsilon": 0.0, "delta": 1e-6}, "must be a budget or both null"),
        ({"epsilon": 1.0, "delta": 1.0}, "must be a budget or both null"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_responses_with_which_no_score_can_be_computed_are_refused(pair, change: dict, sentence: str) -> None:
    record = json.loads(response_of(pair).to_json()) | change
    with pytest.raises(ValueError, match=sentence):
        q.SellerResponse.from_json(json.dumps(record))


def test_no_response_that_loads_has_a_score_that_is_no_number(pair) -> None:
    record = json.loads(response_of(pair).to_json())
    honest = pair[1].seller(response_of(pair))
    for change in ({"mean": [1e11] * 11}, {"second": [[1e11] * 11] * 11}, {"variance_se": [1e11] * 11},
                   {"energy": 1e-9}, {"energy_se": 1e11}, {"rows": 2**53},
                   {"mean_noise": 1e5, "second_noise": 1e11, "epsilon": 1e-9, "delta": 1e-6}):  # fmt: skip
        evil = pair[1].seller(q.SellerResponse.from_json(json.dumps(record | change)))
        for found in rank(pair[1].buyer(), {"evil": evil, "honest": honest}, draws=50):
            assert all(math.isfinite(x) for s in found.scores.values() for x in s), (change, found)


def test_a_file_that_is_refused_is_named(pair, tmp_path) -> None:
    for name, cls in (("r.json", q.SellerResponse), ("q", q.BuyerQuery), ("k", q.BuyerKey)):
        (tmp_path / name).write_text("{")
        with pytest.raises(ValueError, match=f"{name}'$"):
            cls.load(tmp_path / name)


def test_a_query_that_no_seller_could_open_is_not_made() -> None:
    for dimension, directions in ((untrusted.MAX_DIMENSION + 1, 2), (400, 250)):
        encoder = replace(ENCODER, dimension=dimension)
        with pytest.raises(ValueError, match="at most 256 columns of dimension 65536"):
            q.make_query(torch.randn(1000 if directions > 2 else 8, dimension), encoder, directions=directions)


def test_a_mean_within_the_eigenvectors_gives_a_direction_all_the_same() -> None:
    x = torch.zeros(80, 32)
    generator = torch.Generator().manual_seed(0)
    x += torch.randn(80, 1, generator=generator)  # the brightness varies alike everywhere, and so lies the mean
    x[:, :4] += torch.randn(80, 4, generator=generator)
    x = x - x.mean(0) + 1.0
    query, key = q.make_query(x, ENCODER, directions=5, decoys=3)
    assert torch.isfinite(key.buyer().covariance).all()
    spread = key.rotation.T @ (query.directions.double().T @ query.directions.double()) @ key.rotation
    torch.testing.assert_close(spread, torch.eye(9).double(), atol=1e-5, rtol=0)


def test_eigenvectors_have_one_sign_whatever_else_the_query_has() -> None:
    for n in (60, 200):  # by singular values, and by the covariance
        x = rows(n, 0).double()
        x = x - x.mean(0)
        for vectors in (q.leading_eigenvectors(x, 5)[0], q.leading_eigenvectors(-x.flip(0), 5)[0]):
            assert (vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_key_that_is_no_rotation_or_no_number_is_refused(pair, tmp_path) -> None:
    pair[1].save(tmp_path / "k")
    tensors, header = read_tensors((tmp_path / "k").read_bytes(), "key")
    for name, value, sentence in (
        ("rotation", tensors["rotation"] * 1.1, "must be orthogonal"),
        ("mean", tensors["mean"] * float("nan"), "'mean' must be finite"),
    ):
        (tmp_path / "k").write_bytes(save(tensors | {name: value}, {"sgc_market": json.dumps(header)}))
        with pytest.raises(ValueError, match=sentence):
            q.BuyerKey.load(tmp_path / "k")
    (tmp_path / "k").write_bytes(save(tensors, {"sgc_market": json.dumps(header | {"normalize": 1})}))
    with pytest.raises(ValueError, match="'normalize' must be true or false, got 1"):
        q.BuyerKey.load(tmp_path / "k")


def test_as_few_rows_as_are_allowed_make_a_query() -> None:
    assert q.make_query(rows(40, 0), ENCODER)[1].moments.rows == 40
    query = q.make_query(rows(100, 0), ENCODER, directions=6, decoys=4)[0]
    assert q.answer(query, [rows(44, 0)], ENCODER, "s").moments.rows == 44


def test_the_identifier_is_of_directions_and_encoder(pair) -> None:
    directions = pair[0].directions
    others = [replace(ENCODER, digest="1" * 64), replace(ENCODER, name="other"), replace(ENCODER, normalize=True)]
    found = {q.BuyerQuery(directions, encoder).identifier for encoder in (ENCODER, *others)}
    assert len(found | {q.BuyerQuery(directions.flip(1).contiguous(), ENCODER).identifier}) == 5


@pytest.mark.parametrize("factor", [1.001, 0.999])
def test_a_basis_a_thousandth_too_long_or_short_is_refused(pair, factor: float) -> None:
    with pytest.raises(ValueError, match="must be orthonormal, got columns off by 0.00"):
        q.BuyerQuery(pair[0].directions * factor, ENCODER)


def test_noise_that_a_seller_states_reaches_the_buyer(pair) -> None:
    response = response_of(pair)
    noisy = replace(response, moments=replace(response.moments, mean_noise=0.1, second_noise=0.2))
    seller = pair[1].seller(noisy)
    assert (seller.mean_noise, seller.second_noise) == (0.1, 0.2)


def test_the_buyers_own_standard_errors_are_measured_direction_by_direction() -> None:
    x = rows(300, 0)
    x[:, 0] = x[:, 0].sign() * 3  # two points far apart: a large variance that is known well
    query, key = q.make_query(x, ENCODER, directions=4, decoys=3)
    true = (query.directions.double() @ key.rotation).float()
    torch.testing.assert_close(key.moments.variance_se, moments_along(x, true).variance_se, rtol=1e-3, atol=1e-6)
    relative = key.moments.variance_se / key.moments.variance
    assert relative[1] < 0.5 * relative[2:5].min()


def test_the_rotation_favours_no_sign_and_no_axis() -> None:
    found = torch.stack([q._random_rotation(4, torch.Generator().manual_seed(seed)) for seed in range(600)])
    # an entry has mean 0 and variance 1/4; five standard deviations of a mean of 600
    assert float(found.mean(0).abs().max()) < 5 * 0.5 / math.sqrt(600)
    assert float((found.square().mean(0) - 0.25).abs().max()) < 5 * 0.25 / math.sqrt(600)
    torch.testing.assert_close(found.mT @ found, torch.eye(4).double().expand(600, 4, 4))

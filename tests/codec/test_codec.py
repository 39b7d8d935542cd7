import inspect
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgc import Codec
from sgc.codec.layout import make_layout
from sgc.codec.recover import METHODS
from tests.tolerances import RIDGE_VALUE, SUM
from tests.twin import lay_out, sign_matrix

SHAPES = st.one_of(
    st.sampled_from([(), (1,), (0,), (3, 0), (997,), (7, 11, 13), (31, 33), (2, 1, 1, 5), (1, 5000), (16, 640)]),
    st.lists(st.integers(1, 40), max_size=3).map(tuple),
)


def sparse_tensor(shape, chunk_size, s, seed):
    """At most s entries of size ±1 in each chunk."""
    rng = np.random.default_rng(seed)
    x = np.zeros(math.prod(shape))
    for chunk in lay_out(shape, chunk_size)[0] if x.size else []:
        x[rng.permutation(chunk)[:s]] = rng.choice([-1.0, 1.0], len(chunk[:s]))
    return torch.tensor(x.reshape(shape), dtype=torch.float32)


@given(SHAPES, st.sampled_from([48, 100, 128]), st.integers(1, 3), st.booleans(), st.integers(0, 2**32))
def test_decoding_gives_back_what_is_sparse_enough(shape, chunk_size, s, strided, seed):
    """k = 3·s·ln 4n, where 1 chunk in 500 fails: 2 + 2 % of them do in 1 of 10⁶ cases."""
    x = sparse_tensor(shape, chunk_size, s, seed)
    if strided and x.dim() > 1:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    codec = Codec(chunk_size, math.ceil(3 * s * math.log(4 * chunk_size)), s, seed=3)
    back = codec.decode(codec.encode(x), x.shape)
    assert back.shape == x.shape
    assert back.dtype == torch.float32
    wrong = (back - x).abs() > RIDGE_VALUE * math.sqrt(s) + SUM
    chunks = lay_out(shape, chunk_size)[0] if x.numel() else []
    assert sum(bool(wrong.flatten()[chunk].any()) for chunk in chunks) <= 2 + len(chunks) / 50


@given(SHAPES, st.one_of(st.none(), st.integers(1, 200)), st.integers(1, 60), st.integers(1, 9))
def test_a_sketch_is_the_projection_of_the_top_entries_of_each_chunk(shape, chunk_size, k, s):
    x = torch.tensor(np.random.default_rng(0).standard_normal(shape), dtype=torch.float32)
    sketch = Codec(chunk_size, k, s, seed=1).encode(x)
    chunks, n = lay_out(shape, chunk_size)[:2] if x.numel() else ([], 0)
    assert sketch.shape == (len(chunks), min(k, n))
    assert sketch.dtype == torch.float32
    projection = sign_matrix(k, n, 1) if k < n <= 300 else np.eye(n) if k >= n else None
    if projection is None:
        return
    flat = x.flatten().double().numpy()
    for chunk, y in zip(chunks, sketch.double().numpy(), strict=True):
        piece = np.zeros(n)
        piece[: len(chunk)] = flat[chunk]
        kept = sorted(range(n), key=lambda at: (-abs(piece[at]), at))[:s]
        expected = projection[:, kept] @ piece[kept]
        assert np.abs(y - expected).max() <= SUM * max(1.0, np.abs(expected).max())


@given(SHAPES, st.integers(0, 2**32))
def test_the_sketch_of_a_sum_is_the_sum_of_the_sketches(shape, seed):
    codec = Codec(64, 24, 6, seed=2)
    x, y = (sparse_tensor(shape, 64, 3, seed + at) for at in range(2))
    total = codec.encode(x + y)
    difference = total - (codec.encode(x) + codec.encode(y))
    assert difference.numel() == 0 or difference.abs().max() <= SUM * 6


@pytest.mark.parametrize("method", METHODS)
def test_the_sum_of_two_sketches_decodes_to_the_sum(method):
    codec = Codec(128, 96, 3, seed=0)
    x, y = (sparse_tensor((20, 128), 128, 2, at) for at in range(2))
    back = codec.decode(codec.encode(x) + codec.encode(y), x.shape, sparsity=4, method=method)
    same = ((back - x - y).abs().amax(1) <= 2 * RIDGE_VALUE * 2 + SUM).float().mean()
    assert float(same) >= 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_tensor_of_any_real_dtype_is_encoded_in_fp32(dtype):
    x = torch.randn(6, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    codec = Codec(50, 16, 4)
    assert torch.equal(codec.encode(x), codec.encode(x.float()))


def test_a_chunk_no_larger_than_the_sketch_is_kept_as_it_is():
    x = torch.randn(6, 77)
    codec = Codec(77, 77, 77)
    assert torch.equal(codec.encode(x), x)
    assert torch.equal(codec.decode(codec.encode(x), x.shape), x)


def test_the_seed_alone_decides_the_projection():
    x = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Codec(50, 16, 4, seed=1).encode(x), Codec(50, 16, 4, seed=1).encode(x))
    assert not torch.equal(Codec(50, 16, 4, seed=1).encode(x), Codec(50, 16, 4, seed=2).encode(x))


def test_encoding_leaves_its_input_alone():
    x = torch.randn(6, 77)
    before = x.clone()
    codec = Codec(32, 16, 4)
    sketch = codec.encode(x)
    kept = sketch.clone()
    codec.decode(sketch, x.shape)
    assert torch.equal(x, before)
    assert torch.equal(sketch, kept)


@given(
    st.integers(1, 4),
    st.sampled_from([1, 7, 100, 257, 900]),
    st.sampled_from([None, 64, 100]),
    st.sampled_from([20, 300]),
    st.integers(1, 5),
)
def test_rows_are_encoded_each_as_a_vector_of_its_own(number, d, chunk_size, k, s):
    """Bit for bit; and what was kept plus the rest are the vector."""
    x = torch.randn(number, d, generator=torch.Generator().manual_seed(d))
    sketches, rest = Codec(chunk_size, k, sparsity=9).encode_rows(x, sparsity=s)
    codec = Codec(chunk_size, k, s)
    assert torch.equal(sketches, torch.stack([codec.encode(row) for row in x]))
    assert torch.equal(sketches, torch.stack([codec.encode(row) for row in x - rest]))
    assert torch.equal(rest[rest != 0], x[rest != 0])
    chunks = lay_out((d,), chunk_size)[0]
    assert [int((rest[0, chunk] == 0).sum()) for chunk in chunks] == [min(s, len(chunk)) for chunk in chunks]


def test_scattering_leaves_out_what_fell_on_padding():
    layout = make_layout((5,), 3)
    flat = layout.scatter(torch.tensor([[0, 2], [1, 2]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert flat.tolist() == [1.0, 0.0, 2.0, 0.0, 3.0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"sketch_size": 0}, "sketch_size must be at least 1, got 0"),
        ({"sketch_size": -3}, "sketch_size must be at least 1, got -3"),
        ({"sparsity": 0}, "sparsity must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_a_size_out_of_range_is_refused_with_rule_and_value(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Codec(**arguments)


@pytest.mark.parametrize(
    "x", [torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.complex64), torch.zeros(3, 3).to_sparse()]
)
def test_what_is_not_dense_and_real_is_refused(x):
    with pytest.raises(TypeError, match="dense real floating-point tensor, got torch."):
        Codec(32, 16, 4).encode(x)


def test_a_sketch_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"shape \(6, 64\) has a sketch of shape \(12, 16\), got \(3, 16\)"):
        Codec(32, 16, 4).decode(torch.zeros(3, 16), (6, 64))


@pytest.mark.parametrize("sparsity", [0, 17])
def test_more_entries_than_the_sketch_has_numbers_are_refused(sparsity):
    with pytest.raises(ValueError, match=rf"sparsity must be in \[1, sketch_size=16\], got {sparsity}"):
        Codec(32, 16, 4).decode(torch.zeros(12, 16), (6, 64), sparsity=sparsity)


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="method must be one of omp, .*threshold, got 'lasso'"):
        Codec(32, 16, 4).decode(torch.zeros(12, 16), (6, 64), method="lasso")


def test_a_projection_beyond_the_bound_is_refused_before_anything_is_made():
    codec = Codec(None, 2**20, 4)
    with pytest.raises(ValueError, match="set chunk_size, or a smaller sketch_size"):
        codec.encode(torch.empty(2**21, device="meta"))


def test_the_codec_says_what_it_is():
    assert repr(Codec(32, 16, 4, seed=2)) == "Codec(chunk_size=32, sketch_size=16, sparsity=4, seed=2)"


SIZES = {"chunk_size": 32, "sketch_size": 16, "sparsity": 2, "seed": 0}
assert SIZES.keys() == inspect.signature(Codec).parameters.keys()
X = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
CALLS = {  # by argument: a call of the codec with another value in its place
    **{name: lambda value, name=name: Codec(**{**SIZES, name: value}) for name in SIZES},
    "x": lambda value: Codec(**SIZES).encode(value),
    "sketch": lambda value: Codec(**SIZES).decode(value, (10, 32)),
    "shape": lambda value: Codec(**SIZES).decode(torch.zeros(10, 16), value),
    "recovered": lambda value: Codec(**SIZES).decode(torch.zeros(10, 16), (10, 32), sparsity=value),
    "method": lambda value: Codec(**SIZES).decode(torch.zeros(10, 16), (10, 32), method=value),
}
NONSENSE = ["8", "", b"8", object(), {}, [], [1.5], {3}, 0.5, -1, math.nan, math.inf, 10**400, True, torch.tensor(1j)]


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: f"{type(value).__name__}")
@pytest.mark.parametrize("name", CALLS)
def test_nonsense_is_refused_by_the_argument_s_name(name, value):
    with pytest.raises((TypeError, ValueError)) as refusal:
        CALLS[name](value)
    wanted = {"recovered": "sparsity"}.get(name, name)
    assert re.search(rf"\b{wanted}\b", str(refusal.value))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("guise", [np.int64, np.uint8, np.array, torch.tensor], ids=lambda guise: guise.__name__)
def test_a_whole_number_of_any_kind_is_one(name, guise):
    plain, other = Codec(**SIZES), Codec(**{**SIZES, name: guise(SIZES[name])})
    assert repr(other) == repr(plain)
    assert other.decode(other.encode(X), np.array(X.shape)).equal(plain.decode(plain.encode(X), X.shape))


def test_a_codec_says_what_it_is():
    assert repr(Codec()) == "Codec(chunk_size=1024, sketch_size=128, sparsity=16, seed=0)"

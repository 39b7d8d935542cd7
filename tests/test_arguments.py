import math
import warnings

import pytest
import torch

from sgc import SGC

BASE = {
    "chunk_size": 32,
    "sketch_size": 16,
    "sparsity": 4,
    "min_size": 64,
    "moments": "residual",
    "recovery": "threshold",
}


def matrix():
    return torch.nn.Parameter(torch.zeros(8, 64))


BAD_VALUES = [
    ({"lr": -1.0}, r"lr must not be negative, got -1\.0"),
    ({"lr": math.nan}, "lr must not be negative, got nan"),
    ({"lr": torch.tensor(-0.5)}, r"lr must not be negative, got tensor\(-0\.5"),
    ({"eps": -1e-8}, "eps must not be negative, got -1e-08"),
    ({"eps": math.nan}, "eps must not be negative, got nan"),
    ({"weight_decay": -0.1}, r"weight_decay must not be negative, got -0\.1"),
    ({"betas": (1.0, 0.999)}, r"betas must be two numbers in \[0, 1\), got \(1\.0, 0\.999\)"),
    ({"betas": (0.9, -0.1)}, r"betas must be two numbers in \[0, 1\), got \(0\.9, -0\.1\)"),
    ({"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\), got \(0\.9,\)"),
    ({"chunk_size": 1}, "chunk_size must be at least 2, or None for one chunk per tensor, got 1"),
    ({"chunk_size": -5}, "chunk_size must be at least 2.*got -5"),
    ({"sketch_size": -1}, "sketch_size must not be negative, got -1"),
    ({"sparsity": 0}, r"sparsity must be in \[1, chunk_size=32\], got 0"),
    ({"sparsity": 33}, r"sparsity must be in \[1, chunk_size=32\], got 33"),
    ({"sparsity": 0, "chunk_size": None}, r"sparsity must be in \[1, the tensor's size\], got 0"),
    ({"recovered": 0}, r"recovered must be in \[1, chunk_size=32\], got 0"),
    ({"recovered": 17}, r"recovered \(by default sparsity\) must be in \[1, sketch_size=16\], got 17"),
    ({"sparsity": 17}, r"recovered \(by default sparsity\) must be in \[1, sketch_size=16\], got 17"),
    ({"moments": "adam"}, "moments must be one of residual, whitened, sketched, subspace, got 'adam'"),
    ({"recovery": "lasso"}, "recovery must be one of omp, .*threshold, got 'lasso'"),
    ({"state_dtype": "float8"}, "state_dtype must be one of float32, bfloat16, int8, got 'float8'"),
    ({"state_dtype": torch.float16}, "state_dtype must be one of float32, bfloat16, int8, got 'float16'"),
    ({"scale": 0.0}, r"scale must be positive, got 0\.0"),
    ({"scale": math.nan}, "scale must be positive, got nan"),
    ({"rank": 0}, "rank must be at least 1, got 0"),
    ({"refresh_every": 0}, "refresh_every must be at least 1, got 0"),
    ({"min_size": -1}, "min_size must not be negative, got -1"),
    ({"seed": -1}, r"seed must be in \[0, 2⁶³\), got -1"),
    ({"seed": 2**63}, r"seed must be in \[0, 2⁶³\), got 9223372036854775808"),
    ({"sketch_size": 0, "moments": "subspace"}, "sketch_size=0 keeps only .*moments='subspace' has none"),
    ({"sketch_size": 0, "moments": "sketched"}, "sketch_size=0 keeps only .*moments='sketched' has none"),
    ({"rank": 9}, r"rank must be at most 8 for parameter \d \(8×64\), got 9"),
]
BAD_TYPES = [
    *[
        ({name: 1.5}, rf"{name} must be a whole number.*, got 1\.5")
        for name in ("chunk_size", "sketch_size", "sparsity", "recovered", "rank", "refresh_every", "min_size", "seed")
    ],
    ({"sparsity": "4"}, "sparsity must be a whole number.*, got '4'"),
    ({"sketch_size": None}, "sketch_size must be a whole number, got None"),
    *[({name: "x"}, f"{name} must be a number.*, got 'x'") for name in ("lr", "eps", "weight_decay", "scale")],
    *[({name: None}, f"{name} must be a number.*, got None") for name in ("lr", "eps", "weight_decay")],
    ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0\.9"),
    ({"betas": (0.9, "x")}, r"betas must be two numbers in \[0, 1\), got \(0\.9, 'x'\)"),
]


def case_name(case):
    return "-".join(f"{name}={value}" for name, value in case[0].items())


@pytest.mark.parametrize(
    ("error", "changed", "sentence"),
    [(ValueError, *case) for case in BAD_VALUES] + [(TypeError, *case) for case in BAD_TYPES],
    ids=[case_name(case) for case in BAD_VALUES + BAD_TYPES],
)
def test_a_bad_argument_is_refused_with_rule_and_value_and_nothing_changes(error, changed, sentence):
    with pytest.raises(error, match=sentence):
        SGC([matrix()], **{**BASE, **changed})
    optimizer = SGC([matrix()], **BASE)
    before = repr(optimizer.state_dict())
    with pytest.raises(error, match=sentence):
        optimizer.add_param_group({"params": [matrix()], **changed})
    assert len(optimizer.param_groups) == 1
    assert repr(optimizer.state_dict()) == before
    with pytest.raises(error, match=sentence):
        SGC([{"params": [matrix()]}, {"params": [matrix()], **changed}], **BASE)


@pytest.mark.parametrize(
    ("param", "error", "sentence"),
    [
        (torch.zeros(8, 64, dtype=torch.complex64), TypeError, r"parameter 0 is torch\.complex64"),
        (torch.zeros(8, 64, dtype=torch.int64), TypeError, r"parameter 0 is torch\.int64"),
        (torch.zeros(8, 64).to_sparse(), TypeError, r"parameter 0 is torch\.float32 in torch\.sparse_coo"),
        ([1.0, 2.0], TypeError, "SGC trains tensors, parameter 0 is list"),
        (("layer.weight", torch.zeros(8, 64, dtype=torch.complex64)), TypeError, r"layer\.weight is torch\.complex64"),
        (torch.zeros(1, device="meta").expand(2**27), ValueError, "parameter 0: one chunk of 134217728 entries"),
    ],
    ids=["complex", "integer", "sparse", "no tensor", "named", "too large"],
)
def test_a_parameter_that_cannot_be_trained_is_refused_by_name(param, error, sentence):
    with pytest.raises(error, match=sentence):
        SGC([param], **{**BASE, "chunk_size": None, "sketch_size": 64})


def test_a_rank_larger_than_a_named_matrix_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"rank must be at most 8 for layer\.weight \(64×8\), got 9"):
        SGC([("layer.weight", torch.nn.Parameter(torch.zeros(64, 8)))], **BASE, rank=9)


def test_parameters_without_a_name_are_counted_over_all_groups():
    with pytest.raises(ValueError, match="for parameter 2 "):
        SGC([{"params": [matrix(), matrix()]}, {"params": [matrix()], "rank": 9}], **BASE)


def test_a_rank_is_not_asked_of_tensors_kept_dense():
    SGC([torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(5000))], **BASE, rank=8)


def test_no_parameters_are_refused_as_torch_does():
    with pytest.raises(ValueError, match="empty parameter list"):
        SGC([])


def test_a_set_of_parameters_has_no_order_and_is_refused_as_torch_does():
    with pytest.raises(TypeError, match="ordered"):
        SGC([{"params": {matrix(), matrix()}}], **BASE)


@pytest.mark.parametrize(("sketch_size", "would_do"), [(4, 16), (15, 16)])
def test_a_sketch_too_small_is_warned_of_once_with_the_size_that_would_do(sketch_size, would_do):
    groups = [{"params": [matrix()]}, {"params": [matrix()], "weight_decay": 0.0}]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        optimizer = SGC(groups, **{**BASE, "sketch_size": sketch_size})
        for _ in range(3):
            for group in optimizer.param_groups:
                group["params"][0].grad = torch.ones(8, 64)
            optimizer.step()
    (warning,) = seen
    assert f"sketch_size={sketch_size} is small for recovering 4 entries" in str(warning.message)
    assert f"sketch_size={would_do} would do" in str(warning.message)


@pytest.mark.parametrize("changed", [{}, {"sketch_size": 32, "sparsity": 32}, {"sketch_size": 0}])
def test_a_sketch_that_suffices_is_not_warned_of(changed):
    SGC([matrix()], **{**BASE, **changed})  # warnings are errors


@pytest.mark.parametrize(("sketch_size", "sparsity"), [(0, None), (4, 1), (16, 2)])
def test_sparsity_follows_the_sketch_where_it_is_not_given(sketch_size, sparsity):
    (group,) = SGC([matrix()], **{**BASE, "sketch_size": sketch_size, "sparsity": None}).param_groups
    assert (group["sparsity"], group["recovered"]) == (sparsity, sparsity)


def test_arguments_are_put_in_their_plain_form():
    (group,) = SGC([matrix()], **BASE, betas=[0.5, 0.75], state_dtype=torch.bfloat16).param_groups
    assert group["betas"] == (0.5, 0.75)
    assert group["state_dtype"] == "bfloat16"
    assert group["recovered"] == 4


def test_int8_without_bitsandbytes_is_refused_before_anything_is_made(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.functional", None)
    with pytest.raises(ImportError, match=r'state_dtype="int8" needs bitsandbytes: pip install "sgc\[bnb\]"'):
        SGC([matrix()], **BASE, state_dtype="int8")

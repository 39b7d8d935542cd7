import inspect
import io
import math
import re
import warnings
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
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
    ({"lr": math.nan}, "lr must be finite, got nan"),
    ({"lr": torch.tensor(-0.5)}, r"lr must not be negative, got tensor\(-0\.5"),
    ({"eps": -1e-8}, "eps must not be negative, got -1e-08"),
    ({"eps": math.nan}, "eps must be finite, got nan"),
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
    ({"scale": math.nan}, "scale must be finite, got nan"),
    ({"rank": 0}, "rank must be at least 1, got 0"),
    ({"refresh_every": 0}, "refresh_every must be at least 1, got 0"),
    ({"min_size": -1}, "min_size must not be negative, got -1"),
    ({"seed": -1}, "seed must not be negative, got -1"),
    ({"seed": 2**63}, "seed must fit into 64 bits, got 9223372036854775808"),
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
    ({"sketch_size": True}, "sketch_size must be a whole number, got True"),
    ({"lr": True}, "lr must be a number, got True"),
    ({"maximize": "no"}, "maximize must be True or False, got 'no'"),
    ({"betas": {0.9, 0.99}}, r"betas must be two numbers in \[0, 1\), got \{0\.9+, 0\.9+\}"),
    ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0\.9"),
    ({"betas": (0.9, "x")}, r"betas must be two numbers in \[0, 1\), got \(0\.9, 'x'\)"),
]


def through_a_file(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def trained(*shape, **kwargs):
    return torch.zeros(shape or (8, 64), **kwargs).requires_grad_()


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
        (trained(dtype=torch.complex64), TypeError, r"parameter 0 is torch\.complex64"),
        (torch.zeros(8, 64).to_sparse().requires_grad_(), TypeError, r"parameter 0 is torch\.float32 in torch\.sparse"),
        ([1.0, 2.0], TypeError, "SGC trains tensors, parameter 0 is list"),
        (("layer.weight", trained(dtype=torch.complex64)), TypeError, r"layer\.weight is torch\.complex64"),
        (trained(dtype=torch.float8_e4m3fn), TypeError, r"parameter 0 is torch\.float8_e4m3fn"),
        (torch.nn.UninitializedParameter(), TypeError, "parameter 0 has none yet: run the model once before"),
        (trained(2**27, dtype=torch.float16), ValueError, "parameter 0: one chunk of 134217728 entries"),
    ],
    ids=["complex", "sparse", "no tensor", "named", "narrow", "lazy", "too large"],
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


# Every argument of the constructor: these tables are derived from its signature, so that the next one is covered.

ARGUMENTS = {name: p.default for name, p in inspect.signature(SGC).parameters.items() if name != "params"}
MORE = {  # values that go with BASE, other than the default, where there is no other way to tell what kind it is
    "sparsity": 2,
    "recovered": 2,
    "rank": 4,
    "scale": 0.5,
    "chunk_size": 64,
    "sketch_size": 16,
    "foreach": True,
    "fused": False,
    "moments": "whitened",
    "recovery": "omp",
    "state_dtype": "bfloat16",
}


class OwnList(Sequence):
    """A sequence that is neither tuple nor list, as libraries of configurations have it."""

    def __init__(self, values):
        self._values = values

    def __getitem__(self, at):
        return self._values[at]

    def __len__(self):
        return len(self._values)


class Word(str):
    __slots__ = ()


def sound(name):
    return MORE.get(name, ARGUMENTS[name])


def guises(value):
    """Every form in which people's programs give a value."""
    if isinstance(value, bool):
        return [np.bool_(value), torch.tensor(value)]
    if isinstance(value, int):
        return [np.int64(value), np.int32(value), np.array(value), torch.tensor(value)]
    if isinstance(value, float):
        return [np.float64(value), np.array(value), torch.tensor(value, dtype=torch.float64), Fraction(value)]
    if isinstance(value, tuple):
        return [list(value), OwnList(value), np.array(value), torch.tensor(value, dtype=torch.float64)]
    return [Word(value)] if isinstance(value, str) else []


def is_plain(value):
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_guise_of_a_value_is_taken_as_its_plain_form(name):
    (wanted,) = SGC([matrix()], **{**BASE, name: sound(name)}).param_groups
    for guise in guises(sound(name)):
        optimizer = SGC([matrix()], **{**BASE, name: guise})
        (group,) = optimizer.param_groups
        if name == "lr" and isinstance(guise, torch.Tensor):
            assert group["lr"] is guise  # a scheduler may write into it
            continue
        assert group[name] == wanted[name]
        assert is_plain(group[name]), f"{name}={guise!r} is held as {type(group[name])}"
        through_a_file(optimizer.state_dict())


NONSENSE = [
    "",
    "1e-3",
    b"8",
    object(),
    {},
    {"a": 1},
    {1.5},
    [],
    [None],
    (0.5, 0.5, 0.5),
    math.nan,
    math.inf,
    -math.inf,
    -1,
    -0.5,
    1e400,
    10**400,
    10**5000,
    1 + 2j,
    torch.tensor(1 + 2j),
    torch.tensor([1e-3, 2e-3]),
    torch.tensor(math.nan),
    torch.tensor(1.0, device="meta"),
    np.array([1, 2]),
    np.float64("nan"),
    lambda: 1,
    type,
    torch.float64,
]


def refusal(make):
    """Call `make`, and return what it made and nothing, or nothing and the sentence that refuses it."""
    try:
        return make(), None
    except (TypeError, ValueError) as error:
        return None, str(error)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_nonsense_is_refused_by_the_argument_s_name_or_means_something(name):
    for value in NONSENSE:
        param = torch.nn.Parameter(torch.ones(8, 64))
        optimizer, sentence = refusal(lambda param=param, value=value: SGC([param], **{**BASE, name: value}))
        if sentence is not None:
            assert re.search(rf"\b{name}\b", sentence)
            assert "\n" not in sentence
            assert len(sentence) < 300
            continue
        assert is_plain(optimizer.param_groups[0][name])
        param.grad = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        assert param.isfinite().all()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_none_is_refused_by_name_unless_it_is_one_of_the_values(name):
    _, sentence = refusal(lambda: SGC([matrix()], **{**BASE, name: None}))
    may_be_none = ARGUMENTS[name] is None or name == "chunk_size"
    assert sentence is None if may_be_none else re.search(rf"\b{name}\b.*got None", sentence)


SWITCHES = [name for name, value in ARGUMENTS.items() if name in inspect.signature(torch.optim.AdamW).parameters]


@pytest.mark.parametrize("name", SWITCHES)
def test_what_adamw_takes_by_default_sgc_takes_in_the_same_place(name):
    theirs = inspect.signature(torch.optim.AdamW).parameters
    assert ARGUMENTS[name] == theirs[name].default
    if theirs[name].kind is not inspect.Parameter.KEYWORD_ONLY:
        assert list(ARGUMENTS).index(name) == list(theirs).index(name) - 1  # without `params`


def test_every_argument_of_adamw_is_one_of_sgc():
    assert inspect.signature(torch.optim.AdamW).parameters.keys() - {"params"} == set(SWITCHES)


@pytest.mark.parametrize("name", ["amsgrad", "capturable", "differentiable"])
def test_a_switch_that_sgc_does_not_have_is_refused_where_it_is_on(name):
    with pytest.raises(ValueError, match=f"{name} must be False, since .*, got True"):
        SGC([matrix()], **{name: True})
    assert SGC([matrix()], **{name: False}).param_groups[0][name] is False


@pytest.mark.parametrize("value", [False, True, None])
@pytest.mark.parametrize("name", ["foreach", "fused"])
def test_the_choice_of_an_implementation_changes_nothing(name, value):
    steps = []
    for kwargs in ({}, {name: value}):
        param = torch.nn.Parameter(torch.ones(8, 64))
        param.grad = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
        SGC([param], **BASE, **kwargs).step()
        steps.append(param.detach())
    assert steps[0].equal(steps[1])


def train_once(model, optimizer):
    model(torch.ones(2, 64)).sum().backward()  # compressed gradients need the hyperparameters here already
    optimizer.step()


@pytest.mark.parametrize("attach", [False, True])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_the_constructor_refuses_is_refused_in_a_group_too_and_nothing_moves(name, attach):
    model = torch.nn.Linear(64, 8)
    optimizer = SGC(model.parameters(), **BASE)
    if attach:
        optimizer.attach(model)
    train_once(model, optimizer)
    optimizer.zero_grad()
    before, sound_one = [param.clone() for param in model.parameters()], optimizer.param_groups[0][name]
    refused = [value for value in NONSENSE if refusal(lambda value=value: SGC([matrix()], **{**BASE, name: value}))[1]]
    assert len(refused) > 5
    for value in refused:
        optimizer.param_groups[0][name] = value
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
            train_once(model, optimizer)
    optimizer.param_groups[0][name] = sound_one
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.zero_grad()
    train_once(model, optimizer)
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_what_a_scheduler_writes_into_a_group_is_saved_in_its_plain_form(name):
    optimizer = SGC([matrix()], **BASE)
    for guise in guises(sound(name)):
        if isinstance(guise, np.generic | np.ndarray) and not guise.shape:
            optimizer.param_groups[0][name] = guise
            through_a_file(optimizer.state_dict())
    if name == "betas":
        optimizer.param_groups[0]["betas"] = (np.float64(0.8), np.float32(0.5))
        assert through_a_file(optimizer.state_dict())["param_groups"][0]["betas"] == (0.8, 0.5)


@pytest.mark.parametrize("shape", [(8, 32), (4, 64), (16, 64), (512,)])
@pytest.mark.parametrize("changed", [{}, {"sketch_size": 0, "sparsity": None}, {"min_size": 1 << 20}], ids=str)
def test_a_parameter_that_has_changed_its_shape_is_refused_by_name(changed, shape):
    weight = matrix()
    optimizer = SGC([("weight", weight)], **{**BASE, **changed})
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    weight.grad = None
    weight.data = torch.ones(shape)
    weight.grad = torch.ones(shape)
    with pytest.raises(ValueError, match="the state of weight should hold .* it holds"):
        optimizer.step()
    optimizer.state.clear()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_gradient_that_is_no_real_floating_point_tensor_is_refused_by_name(dtype):
    weight = matrix()
    weight.grad_dtype = None  # any
    weight.grad = torch.ones(weight.shape, dtype=dtype)
    with pytest.raises(TypeError, match=f"real floating-point gradients, weight has one of {dtype}"):
        SGC([("weight", weight)], **BASE).step()


@pytest.mark.parametrize("given", [3, "params", [], {"lr": 1.0}, torch.zeros(3)], ids=repr)
def test_a_group_that_is_none_is_refused(given):
    with pytest.raises(TypeError, match='a group of parameters must be a dict with "params", got'):
        SGC([matrix()], **BASE).add_param_group(given)


# Frozen parameters


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bool, torch.complex64, torch.float16, torch.float64])
@pytest.mark.parametrize("changed", [{}, {"sketch_size": 0, "sparsity": None}, {"rank": 4}], ids=str)
def test_frozen_parameters_of_any_dtype_are_passed_over_and_hold_nothing(dtype, changed):
    frozen = torch.nn.Parameter(torch.ones(9, 70).to(dtype), requires_grad=False)
    alone, beside = torch.nn.Parameter(torch.ones(8, 64)), torch.nn.Parameter(torch.ones(8, 64))
    optimizers = SGC([alone], **{**BASE, **changed}), SGC([frozen, beside], **{**BASE, **changed})
    for optimizer, param in zip(optimizers, (alone, beside), strict=True):
        for step in range(2):
            param.grad = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    assert alone.detach().equal(beside.detach())
    assert frozen.equal(torch.ones(9, 70).to(dtype))
    assert optimizers[0].stats() == pytest.approx(optimizers[1].stats(), nan_ok=True)
    assert optimizers[0].expected_state_bytes() == optimizers[1].expected_state_bytes()


def test_a_frozen_parameter_is_judged_when_it_is_trained_after_all():
    param = torch.nn.Parameter(torch.ones(8, 64), requires_grad=False)
    optimizer = SGC([("layer.weight", param)], **BASE, rank=9)
    param.requires_grad_()
    param.grad = torch.ones(8, 64)
    with pytest.raises(ValueError, match=r"rank must be at most 8 for layer\.weight"):
        optimizer.step()

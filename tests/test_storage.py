import builtins
import math

import numpy as np
import pytest
import torch

from sgc.apply import stochastic_round
from sgc.state import DTYPES, read_held, write_held
from tests.tolerances import EPS_BF16, SIGMAS

QUANTIZED_BLOCK = DTYPES["int8"].block


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("value", [1.0 + 1 / 512, -1.0 - 3 / 1024, 3.14159, -1e-20, 2.5e30, 1e-39])
def test_stochastic_rounding_goes_to_a_neighbour_and_its_mean_is_the_number(value):
    tries = 40_000
    x = torch.full((tries,), value)
    rounded = stochastic_round(x, generator()).double()
    exact = float(torch.tensor(value).double())
    low, high = (float(end) for end in (rounded.min(), rounded.max()))
    assert low <= exact <= high
    assert (
        torch.tensor(low).bfloat16().view(torch.int16).int().sub(torch.tensor(high).bfloat16().view(torch.int16)).abs()
        == 1
    )
    share = (exact - low) / (high - low)
    deviation = (high - low) * math.sqrt(share * (1 - share) / tries)
    assert abs(float(rounded.mean()) - exact) <= SIGMAS * deviation


def test_stochastic_rounding_keeps_what_bf16_holds():
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-126, math.inf, -math.inf, 1.0078125])
    for seed in range(20):
        assert torch.equal(stochastic_round(x, generator(seed)), x.bfloat16())


def test_stochastic_rounding_is_decided_by_its_generator():
    x = torch.randn(1000, generator=generator())
    before = torch.get_rng_state()
    assert torch.equal(stochastic_round(x, generator(3)), stochastic_round(x, generator(3)))
    assert not torch.equal(stochastic_round(x, generator(3)), stochastic_round(x, generator(4)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_any_shape_is_rounded(shape):
    assert stochastic_round(torch.ones(shape), generator()).shape == shape


def test_a_moment_in_fp32_is_held_without_a_copy():
    state = {"sketch": torch.zeros(3, 4)}
    moment = read_held(state, "sketch")
    moment += 1
    write_held(state, "sketch", moment, None)
    assert moment is state["sketch"]
    assert torch.equal(state["sketch"], torch.ones(3, 4))


def test_another_tensor_is_copied_into_what_is_held():
    state = {"sketch": torch.zeros(3, 4)}
    held = state["sketch"]
    write_held(state, "sketch", torch.ones(3, 4), None)
    assert state["sketch"] is held
    assert torch.equal(held, torch.ones(3, 4))


def test_a_moment_in_bf16_is_read_in_fp32_and_rounded_without_bias():
    state = {"sketch": torch.zeros(40_000, dtype=torch.bfloat16)}
    value = 1.0 + EPS_BF16 / 4
    write_held(state, "sketch", torch.full((40_000,), value), generator())
    assert state["sketch"].dtype is torch.bfloat16
    held = read_held(state, "sketch")
    assert held.dtype is torch.float32
    assert abs(float(held.double().mean()) - value) <= SIGMAS * EPS_BF16 * math.sqrt(3 / 16 / 40_000)


@pytest.mark.parametrize("name", ["sketch", "square_sketch", "sketch_sq"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (16, 64)])
def test_a_moment_in_int8_comes_back_near(name, shape):
    pytest.importorskip("bitsandbytes")
    x = torch.tensor(np.random.default_rng(0).standard_normal(shape), dtype=torch.float32)
    x = x.square() if name == "sketch_sq" else x
    blocks = math.ceil(x.numel() / QUANTIZED_BLOCK)
    state = {name: torch.zeros(shape, dtype=torch.uint8), name + "_absmax": torch.zeros(blocks)}
    write_held(state, name, x, None)
    back = read_held(state, name)
    assert back.dtype is torch.float32
    assert back.shape == x.shape
    # the dynamic maps' widest step is 1/64 of the largest entry of a block, so half of it at most is lost
    assert (back - x).abs().max() <= x.abs().max() / 100
    assert state[name].numel() == x.numel()
    assert state[name + "_absmax"].all()


@pytest.mark.parametrize("name", ["sketch", "sketch_sq"])
def test_a_state_of_zeros_is_zero_in_int8(name):
    pytest.importorskip("bitsandbytes")
    blocks = math.ceil(300 / QUANTIZED_BLOCK)
    state = {name: torch.zeros(3, 100, dtype=torch.uint8), name + "_absmax": torch.zeros(blocks)}
    assert torch.equal(read_held(state, name), torch.zeros(3, 100))
    write_held(state, name, torch.zeros(3, 100), None)
    assert torch.equal(read_held(state, name), torch.zeros(3, 100))


def test_int8_without_bitsandbytes_says_what_to_install(monkeypatch):
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    state = {"sketch": torch.zeros(3, 4, dtype=torch.uint8), "sketch_absmax": torch.zeros(1)}
    with pytest.raises(ImportError, match=r'state_dtype="int8" needs bitsandbytes: pip install'):
        read_held(state, "sketch")

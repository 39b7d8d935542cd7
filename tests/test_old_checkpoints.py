"""Checkpoints that version 0.1 has written load, and training goes on as it would have gone on there."""

import warnings
from pathlib import Path

import pytest
import torch

from sgc import SGC
from tests.tolerances import EPS

SAVED = torch.load(Path(__file__).parent / "data" / "checkpoints_0.1.pt", weights_only=True)


def gradients(step):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(24, 40, generator=generator), torch.randn(7, generator=generator)]


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_version_0_1_goes_on_as_it_did_there(name):
    """The file holds the weights after three steps, the checkpoint, and the weights after three more."""
    if "int8" in name:
        pytest.importorskip("bitsandbytes", reason="its moments are in 8 bits")
    saved = SAVED[name]
    params = [torch.nn.Parameter(weight.clone()) for weight in saved["weights"]]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sketch_size=8 is small")
        optimizer = SGC(params, lr=1e-2, **saved["arguments"])
    optimizer.load_state_dict(saved["checkpoint"])
    for step in range(3, 6):
        for param, gradient in zip(params, gradients(step), strict=True):
            param.grad = gradient
        optimizer.step()
    for param, expected, before in zip(params, saved["weights_after_three_more"], saved["weights"], strict=True):
        assert not torch.equal(param, before)
        assert (param - expected).abs().max() <= 8 * EPS * expected.abs().max()  # another CPU may add in another order
    assert optimizer.state_dict()["state"][0].keys() == saved["checkpoint"]["state"][0].keys()

import subprocess
import sys
import warnings

import pytest
import torch

from sgc import SGC, backends

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_warned_yet():
    backends._warn_once.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """Let dispatch believe in a GPU, whatever is here."""
    monkeypatch.delenv("SGC_KERNELS", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    monkeypatch.setattr(backends, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(backends, "_device_name", lambda index: "a GPU")
    return monkeypatch


def test_a_cpu_takes_torch_and_a_gpu_the_kernels_without_a_warning(gpu):
    assert backends.choose("apply", CPU).path == "torch"
    assert backends.choose("apply", GPU).path == "triton"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("_has_triton", lambda: False, "Triton is not installed"),
        ("_capability", lambda index: (7, 5), "this GPU has 7.5"),
    ],
)
def test_a_gpu_without_what_kernels_need_takes_torch_and_says_so_once(gpu, name, value, reason):
    gpu.setattr(backends, name, value)
    with pytest.warns(UserWarning, match=reason):
        assert backends.choose("apply", GPU).path == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason in backends.choose("apply", GPU).reason


def test_kernels_in_the_interpreter_do_not_touch_a_gpu(gpu):
    gpu.setenv("TRITON_INTERPRET", "1")
    with pytest.warns(UserWarning, match="TRITON_INTERPRET=1"):
        assert backends.choose("apply", GPU).path == "torch"


def test_the_environment_decides(gpu):
    gpu.setenv("SGC_KERNELS", "torch")
    assert backends.choose("apply", GPU) == ("torch", "SGC_KERNELS=torch")
    gpu.setenv("SGC_KERNELS", "triton")
    assert backends.choose("apply", GPU).path == "triton"
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 switches on"):
        backends.choose("apply", CPU)
    gpu.setattr(backends, "_has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        backends.choose("apply", GPU)
    gpu.setenv("SGC_KERNELS", "yes")
    with pytest.raises(ValueError, match="got 'yes'"):
        backends.choose("apply", CPU)


def test_a_reason_is_given_once_for_every_stage(gpu):
    for stage in ("apply", "encode"):
        with pytest.warns(UserWarning, match=f"{stage} takes the plain torch path: a reason"):
            assert backends.choose(stage, GPU, "a reason") == ("torch", "a reason")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose("apply", GPU, "a reason").path == "torch"
    with pytest.warns(UserWarning, match="another"):
        backends.choose("apply", GPU, "another")


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.ones(64, 80, dtype=torch.float64), "its dtype is torch.float64"),
        (torch.ones(80, 64).T, "its weights are not contiguous"),
    ],
    ids=["float64", "transposed"],
)
def test_a_tensor_that_kernels_cannot_move_is_moved_by_torch(forced, monkeypatch, weight, reason):
    pytest.importorskip("triton", reason="the kernels need Triton")
    moved = []
    for path in ("triton", "torch"):
        monkeypatch.setenv("SGC_KERNELS", path)
        param = torch.nn.Parameter(weight.clone())
        optimizer = SGC([param], min_size=0)
        for step in range(2):
            param.grad = torch.ones_like(param)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            said = [str(one.message) for one in caught if reason in str(one.message)]
            assert len(said) == (path == "triton" and step == 0)
        moved.append(param.detach().clone())
    torch.testing.assert_close(*moved)


STEP = """
import sys, torch
{before}
from sgc import SGC
param = torch.nn.Parameter(torch.ones(64, 80))
param.grad = torch.ones(64, 80)
optimizer = SGC([param], min_size=0)
optimizer.step()
assert optimizer.stats()["skipped_tensors"] == 0 and (param < 1).all()
assert sys.modules.get("sgc.backends.triton") is None
"""


@pytest.mark.parametrize("before", ["", 'sys.modules["sgc.backends.triton"] = None'], ids=["as it is", "no kernels"])
def test_a_cpu_does_not_need_the_kernels(before, monkeypatch):
    monkeypatch.delenv("SGC_KERNELS", raising=False)
    subprocess.run([sys.executable, "-W", "error", "-c", STEP.format(before=before)], check=True)

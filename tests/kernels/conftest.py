"""Kernels run compiled where there is a GPU, at real sizes, and else in Triton's interpreter, at small ones."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def real_sizes() -> bool:
    """Whether the kernels run compiled, so that sizes need not be small."""
    return torch.cuda.is_available()


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every stage take its kernel, on a CPU too."""
    monkeypatch.setenv("SGC_KERNELS", "triton")


@pytest.fixture(scope="module")
def twins_in_torch() -> Iterator[None]:
    """Keep twins from being kernels themselves, where kernels are called directly."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SGC_KERNELS", "torch")
        yield

"""Kernels run compiled where there is a GPU, at real sizes, and else in Triton's interpreter, at small ones."""

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

"""Which path a stage of the optimizer takes: its Triton kernel, or plain torch.

Every stage with a kernel has a twin in plain torch with the same results. A CPU takes torch, or
numba where it is installed (`sgc.backends.numba`), an NVIDIA GPU the kernels.
`SGC_KERNELS` in the environment decides otherwise: "torch" nowhere a kernel, "triton" everywhere (on a CPU inside
Triton's interpreter, which `TRITON_INTERPRET=1` must have switched on before triton was imported), "auto" as said.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from importlib import metadata
from typing import Literal, NamedTuple

import torch

VARIABLE = "SGC_KERNELS"
CAPABILITY = (8, 0)  # the oldest NVIDIA architecture that has bf16, and that the kernels are compiled for


class Choice(NamedTuple):
    """The path of a stage, and a clause that says why."""

    path: Literal["triton", "torch", "numba"]
    reason: str

    @property
    def fused(self) -> bool:
        """Whether it is the kernel."""
        return self.path == "triton"


def choose(stage: str, device: torch.device, obstacle: str | None = None) -> Choice:
    """Say which path a stage takes on a device, and why.

    Args:
        stage: its name in a warning, as "statistics", "apply", "encode" or "decode".
        device: of the tensors.
        obstacle: why the stage's kernel can't do what is asked, as "its dtype is torch.float64"; None: it can.

    Returns:
        The path. A stage that would take its kernel and can't takes torch, and warns, once for each reason.

    Raises:
        ValueError: `SGC_KERNELS` is something else than "auto", "torch", "triton" or "numba".
        RuntimeError: it is "triton", and there is no Triton, or no interpreter for the CPU.
    """
    mode = requested()
    if mode in ("torch", "numba"):
        return Choice("torch", f"{VARIABLE}={mode}")
    if mode == "auto" and device.type != "cuda":
        return Choice("torch", f"on {device.type} torch is the path")
    missing = _missing(device.type, _index(device))
    if mode == "triton":
        if missing is not None:
            raise RuntimeError(f"{VARIABLE}=triton asks for kernels on {device}, but {missing}")
        fused = Choice("triton", f"{VARIABLE}=triton")
    elif missing is not None:
        return _fall_back(stage, missing)
    else:
        fused = Choice("triton", f"Triton {_triton_version()} on {_device_name(_index(device))}")
    return fused if obstacle is None else _fall_back(stage, obstacle)


def requested() -> str:
    """Give what `SGC_KERNELS` asks for, "auto" where it is not set; "numba" is about a CPU only (`sgc.backends.numba`).

    Raises:
        ValueError: it is something else than "auto", "torch", "triton" or "numba".
    """
    mode = os.environ.get(VARIABLE) or "auto"
    if mode not in ("auto", "torch", "triton", "numba"):
        raise ValueError(f"{VARIABLE} must be auto, torch, triton or numba, got {mode!r}")
    return mode


def interpreted() -> bool:
    """Whether kernels would run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _missing(kind: str, index: int) -> str | None:
    """Say what keeps every kernel from running on a device, or None."""
    if not _has_triton():
        return 'Triton is not installed: pip install "sgc[triton]"'
    if interpreted():
        return None if kind == "cpu" else f"TRITON_INTERPRET=1 runs them on a CPU, and the tensors are on {kind}"
    if kind != "cuda":
        return f"on {kind} they run in Triton's interpreter only, which TRITON_INTERPRET=1 switches on"
    if torch.version.hip is not None:
        return "the kernels are made for NVIDIA GPUs, and this torch is built for ROCm"
    capability = _capability(index)
    if capability < CAPABILITY:
        return "the kernels need compute capability {}.{}, and this GPU has {}.{}".format(*CAPABILITY, *capability)
    return None


def _fall_back(stage: str, reason: str) -> Choice:
    _warn_once(stage, reason)
    return Choice("torch", reason)


@functools.cache
def _warn_once(stage: str, reason: str) -> None:
    warnings.warn(f"SGC: {stage} takes the plain torch path: {reason}", stacklevel=5)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:  # a nightly build of torch brings it under another name
        return "of unknown version"


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)

"""Which backend does a stage: Triton's kernels, loops compiled by numba, or the stage's twin in plain torch.

Every stage is written once in plain torch, and `stage` makes it reach the backends of the table at the end of this
file: a new backend is one line there, and a module with functions of the stages' names. A GPU takes Triton's kernels, a
CPU takes numba where it is installed, and whatever no backend takes is done by torch, with the same results.
`SGC_KERNELS` in the environment decides otherwise: "torch" takes no backend anywhere, "triton" takes kernels everywhere
(on a CPU in Triton's interpreter, which `TRITON_INTERPRET=1` must have switched on before triton was imported),
"numba" insists on numba on a CPU, "auto" is as said.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Literal, NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

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
    """Return whether a stage takes its Triton kernel on a device, and why.

    Args:
        stage: its name in a warning: "statistics", "apply", "encode" or "recover".
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


def fused(device: torch.device) -> bool:
    """Whether a device takes kernels."""
    return _serves_triton(requested(), "encode", device)


def requested() -> str:
    """Return what `SGC_KERNELS` asks for, "auto" where it is not set; "numba" concerns a CPU only.

    Raises:
        ValueError: it is something else than "auto", "torch", "triton" or "numba".
    """
    mode = os.environ.get(VARIABLE) or "auto"
    modes = ["auto", "torch", *(backend.name for backend in BACKENDS)]
    if mode not in modes:
        raise ValueError(f"{VARIABLE} must be {', '.join(modes[:-1])} or {modes[-1]}, got {mode!r}")
    return mode


def interpreted() -> bool:
    """Whether kernels would run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _missing(kind: str, index: int) -> str | None:
    """Return what keeps every kernel from running on a device, or None."""
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


# ------------------------------------------------------------------------------------------------ the one dispatch


class Backend(NamedTuple):
    """One way to do stages: a module whose functions have the names and arguments of the stages that it does."""

    name: str  # what `SGC_KERNELS` calls it
    module: str  # imported when it is first asked; a function returns NotImplemented for what it can't do
    serves: Callable[[str, str, torch.device], bool]  # whether to ask it, given the mode, the stage and the device


def stage(noun: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a stage of its twin in plain torch: the first backend that does not refuse does it, else the twin.

    Args:
        noun: the stage in a warning: "statistics", "apply", "encode" or "recover".

    Returns:
        A decorator for the twin, whose first argument is a tensor on the device that decides.
    """

    def made(plain: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(plain)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            mode, device = requested(), args[0].device  # type: ignore[attr-defined]  # a tensor
            for backend in BACKENDS:
                if backend.serves(mode, noun, device):
                    function = getattr(_loaded(backend.module), plain.__name__, None)
                    done = NotImplemented if function is None else function(*args, **kwargs)
                    if done is not NotImplemented:
                        return done
            return plain(*args, **kwargs)

        return run

    return made


def _loaded(module: str) -> ModuleType:
    return sys.modules.get(module) or importlib.import_module(module)


def _serves_triton(mode: str, noun: str, device: torch.device) -> bool:
    return (mode == "triton" or (mode == "auto" and device.type == "cuda")) and choose(noun, device).fused


def _serves_numba(mode: str, noun: str, device: torch.device) -> bool:
    return device.type == "cpu" and mode in ("auto", "numba") and _loaded("sgc.backends.numba").takes(mode)


BACKENDS = (
    Backend("triton", "sgc.backends.triton.stages", _serves_triton),
    Backend("numba", "sgc.backends.numba", _serves_numba),
)

"""What `sgc doctor` prints: which path each stage takes on each device here, and why, with versions."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import torch

import sgc
from sgc import backends
from sgc.backends import numba as compiled
from sgc.optimizer import SGC

STAGES = {
    "statistics": "row and column means of g²",
    "apply": "whiten and move every weight; AdamW of small tensors",
    "encode": "sparsify and project",
    "recover": "the sparse entries that explain a sketch",
}
PACKAGES = ("triton", "numba", "transformers", "accelerate", "peft", "trl", "deepspeed", "bitsandbytes", "flwr")
CHECKED = 1e-5  # largest difference between a kernel's weights and torch's, relative to how far they move


def report() -> str:
    """Report which path every stage takes on every device here and why, and the versions of what it depends on."""
    return "\n".join([*_versions(), "", *_environment(), "", *_paths()])


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def devices() -> list[torch.device]:
    """List the CPU and every GPU."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *gpus]


def path_of(stage: str, device: torch.device) -> tuple[str, str]:
    """Return the path of a stage on a device and why: "triton", "numba" or "torch", or "refused"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the reason is in the report
            chosen = backends.choose(stage, device)
        if device.type == "cpu" and not chosen.fused:
            chosen = compiled.choose()
    except (RuntimeError, ValueError) as error:
        return "refused", str(error)
    return chosen.path, chosen.reason


def _versions() -> Iterator[str]:
    yield f"sgc {sgc.__version__}, Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
    found = {package: version_of(package) for package in PACKAGES}
    yield "installed: " + (
        ", ".join(f"{name} {version}" for name, version in found.items() if version) or "nothing else"
    )
    missing = [name for name, version in found.items() if not version]
    if missing:
        yield "not installed: " + ", ".join(missing)


def _environment() -> Iterator[str]:
    for name in (backends.VARIABLE, "TRITON_INTERPRET"):
        yield f"{name}: {os.environ.get(name) or 'not set'}"


def _paths() -> Iterator[str]:
    for device in devices():
        yield f"{device}: {_description(device)}"
        taken = {stage: path_of(stage, device) for stage in STAGES}
        for stage, (path, reason) in taken.items():
            yield f"  {stage:<11}{path:<8}{reason}  ({STAGES[stage]})"
        if taken["apply"][0] == "triton":
            yield f"  checked: {_check(device)}"


def _description(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    capability = f"compute capability {properties.major}.{properties.minor}"
    return f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"


def _check(device: torch.device) -> str:
    """Make an update by the kernels and one by torch, and compare them."""
    try:
        difference = _difference(device)
    except Exception as error:  # whatever a broken compiler or driver raises is what this report is for
        return f"FAILED: {type(error).__name__}: {error}"
    verdict = "agree" if difference <= CHECKED else "DISAGREE"
    return f"kernels and torch {verdict}, {difference:.0e} of an update apart"


def _difference(device: torch.device) -> float:
    gradient = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(device)
    moved = []
    for path in ("triton", "torch"):
        weight = torch.nn.Parameter(torch.zeros_like(gradient))
        optimizer = SGC([weight], lr=1e-2, min_size=0)
        weight.grad = gradient
        with _forced(path):
            optimizer.step()
            optimizer.stats()  # waits for the device
        moved.append(weight.detach())
    return float((moved[0] - moved[1]).abs().max() / moved[1].abs().max())


@contextmanager
def _forced(path: str) -> Iterator[None]:
    before = os.environ.get(backends.VARIABLE)
    os.environ[backends.VARIABLE] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ[backends.VARIABLE]
        else:
            os.environ[backends.VARIABLE] = before

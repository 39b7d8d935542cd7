"""What every benchmark shares: rows that name their machine, versions and commit, and cells that are measured once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "triton", "bitsandbytes", "peft", "galore-torch", "apollo-torch")


def provenance() -> dict[str, Any]:
    """Name the commit, the machine and the versions that a row was measured with."""
    import torch

    root = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip()
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    return {"commit": commit, "machine": machine, "versions": versions, "threads": torch.get_num_threads()}


def rows(name: str) -> list[dict[str, Any]]:
    """Read the rows of results/NAME.jsonl."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_row(name: str, row: dict[str, Any]) -> None:
    """Append a row in one write under a lock, so that several processes may share the file."""
    RESULTS.mkdir(exist_ok=True)
    stamped = {**row, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **provenance()}
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(stamped) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def claim(name: str, cell: str) -> Iterator[bool]:
    """Claim a cell for this process: yields False where another one, still alive, is measuring it.

    The lock is the kernel's and falls with the process, so a killed run leaves nothing to clear.
    """
    folder = RESULTS / ".claims"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.{cell.replace('/', '_')}", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True

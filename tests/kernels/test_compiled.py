"""Kernels compile for a GPU, on a machine without one: the interpreter runs what a compiler refuses."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("cases", "kernels"), [("tests.kernels.sketch_cases", {"_encode": 3, "_recover": 1, "_apply": 2})]
)
def test_every_kernel_compiles_for_an_h100(cases, kernels, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": "."}
    command = [sys.executable, "-W", "error", "-m", "tests.kernels.compiled", cases]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert {name: names.count(name) for name in set(names)} == kernels

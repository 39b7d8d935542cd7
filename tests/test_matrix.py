"""Harness × dtype × moment rule × feature: a pairwise selection, or with SGC_MATRIX=all every combination."""

import importlib.util
import os

import pytest
import torch

from sgc.moments import RULES
from tests.matrix import FEATURES, HARNESSES, check
from tests.pairwise import every, named, pairwise
from tests.processes import Processes

FACTORS = {
    "harness": list(HARNESSES),
    "dtype": [torch.float32, torch.bfloat16],
    "rule": ["memoryless", *RULES],
    "feature": list(FEATURES),
}
CASES = (every if os.environ.get("SGC_MATRIX") == "all" else pairwise)(FACTORS)
pytestmark = pytest.mark.xdist_group("matrix")  # one set of processes for all


@pytest.fixture(scope="module")
def pools():
    """Processes that stay up; a failure may leave one waiting for the other, so it costs the set."""
    kept = []
    yield kept
    for pool in kept:
        pool.close()


@pytest.mark.parametrize("case", CASES, ids=named)
def test_every_harness_has_every_feature(pools, tmp_path, case):
    if case["harness"].startswith("ZeRO") and not importlib.util.find_spec("deepspeed"):
        pytest.skip('needs DeepSpeed: pip install --no-build-isolation "sgc[deepspeed]"')
    if not pools:
        pools.append(Processes(2))
    try:
        pools[0].run(check, case, str(tmp_path))
    except BaseException:
        pools.pop().kill()
        raise

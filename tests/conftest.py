"""Set-up for every test. The environment comes first: torch and transformers read it when they are imported."""

import os

# One thread per worker: pytest-xdist fills the cores, and sums keep one order.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
# Nothing in the tests comes from a hub; a test that tries must fail at once and not wait for a network.
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a GPU, kernels run in Triton's interpreter, which has to be switched on before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Time is no oracle here: the first call of a torch operator can take a second, so no deadline and no too_slow check.
settings.register_profile("default", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public data sets: `SGC_SHARED_DATA`, or `shared/data` beside the repository."""
    named = os.environ.get("SGC_SHARED_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if folder.is_dir():
        return folder
    if named:
        pytest.fail(f"SGC_SHARED_DATA names a folder that does not exist: {folder}")
    # the data are not the project's to ship, so a checkout without them still tests everything else
    pytest.skip(f"needs the public data sets, in {folder} or where SGC_SHARED_DATA points")

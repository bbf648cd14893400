"""What every test stands on: seeds, threads, study data where it is at hand, GPU tests only with a GPU."""

import os

os.environ["WANDB_MODE"] = "offline"

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parent.parent

# Examples are drawn from the test's name: a red test is red again, on any machine.
settings.register_profile("dqss", deadline=None, derandomize=True, database=None)
settings.load_profile("dqss")

# Sums depend on the number of threads; tests that compare bits want one number on every machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of study data: $DQSS_SHARED_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("DQSS_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no study data at {folder}; set DQSS_SHARED_DATA to its folder")
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

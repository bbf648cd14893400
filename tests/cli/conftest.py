"""One finished search that all tests of the command line may look at, and none may change."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.runner import TINY, call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished search."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    outcome = call("search", *TINY, f"run_dir={folder}", cwd=folder.parent)
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of forty grey images of 8x8 pixels."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for index in range(40):
        pixels = random.integers(0, 256, (8, 8)).astype(np.uint8)
        Image.fromarray(pixels, "L").save(folder / f"{index:02}.png")
    return folder

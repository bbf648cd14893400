"""One finished search that all tests of the command line may look at, and none may change."""

from pathlib import Path

import pytest

from tests.cli.runner import TINY, call


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a finished search."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    outcome = call("search", *TINY, f"run_dir={folder}", cwd=folder.parent)
    assert outcome.code == 0, outcome.err
    return folder

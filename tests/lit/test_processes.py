"""Two processes do what one does."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dqss.errors import UserError
from dqss.lit.ranks import check_processes

REPOSITORY = Path(__file__).resolve().parents[2]


def run(folder: Path, what: str, processes: int) -> list[dict[str, Any]]:
    """The results of each process."""
    folder.mkdir()
    launcher = []
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    words = [*launcher, "-m", "tests.support.processes", str(folder), what]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    place = tmp_path_factory.mktemp("processes")
    return run(place / "one", "qat", 1)[0], run(place / "two", "qat", 2)


def test_first_gradients_are_those_of_one_process(training) -> None:
    alone, both = training
    for found in both:
        assert found["gradients"].keys() == alone["gradients"].keys()
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-5, atol=1e-5)


def test_logits_are_the_same_in_all_processes_throughout(training) -> None:
    _, (first, second) = training
    assert torch.equal(first["logits"], second["logits"])
    assert bool((first["logits"] != 0).any())


def test_all_processes_end_with_the_same_network(training) -> None:
    _, (first, second) = training
    assert all(torch.equal(value, second["tensors"][key]) for key, value in first["tensors"].items())


def test_post_training_search_finds_the_same_strategy(tmp_path: Path) -> None:
    (alone,) = run(tmp_path / "one", "ptq", 1)
    both = run(tmp_path / "two", "ptq", 2)
    # Where the margin is small, the order of a sum may decide.
    assert all(margin > 0.1 for _, margin in alone["choices"].values())
    wanted = {name: bits for name, (bits, _) in alone["choices"].items()}
    for found in both:
        assert {name: bits for name, (bits, _) in found["choices"].items()} == wanted


def test_more_devices_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="torchrun --nproc_per_node=2"):
        check_processes({"devices": 2})
    assert check_processes({}) == {"devices": 1}
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert check_processes({}) == {"devices": 2, "num_nodes": 2, "strategy": "ddp"}
    with pytest.raises(UserError, match="there are 4 processes"):
        check_processes({"devices": 3})

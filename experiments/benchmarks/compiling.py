"""How many kernels a network's search has compiled, and how long that takes, once.

    python -m experiments.benchmarks.compiling

Each row is a process that calibrates the candidates of a network and makes two steps of the search: the
first with an empty folder for compiled code, the second with what the first has left there. Rows are
appended to compiling.csv; rows that are there already are not computed again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dqss.models.factory import timm_model
from experiments.benchmarks import steps
from experiments.benchmarks.measure import SPACES
from experiments.benchmarks.networks import Network
from experiments.harness import Table, quiet

HERE = Path(__file__).parent
COLUMNS = ("network", "candidates", "cache", "kernels", "seconds")
BITS = 8
CACHE = "TORCHINDUCTOR_CACHE_DIR"


def two_steps(name: str, candidates: int) -> None:
    """What is timed: all that a search compiles on its way."""
    network = Network(lambda: timm_model(name), 224, name)
    model, images = network.build(), network.inputs(steps.IMAGES)
    step = steps.make(
        "search",
        model,
        images,
        lambda: steps.calibrated(model, images, SPACES[candidates](BITS), images.device),
    )
    step()
    step()


def alone(name: str, candidates: int, cache: Path) -> tuple[int, float]:
    """Kernels in the cache after a process of its own, and its seconds on the wall."""
    command = [sys.executable, "-m", "experiments.benchmarks.compiling", "--network", name, "--inside"]
    command += ["--candidates", str(candidates)]
    started = time.perf_counter()
    subprocess.run(command, env={**os.environ, CACHE: str(cache)}, check=True)
    return len(list(cache.rglob("*.so"))), time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    """Compute the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", default="resnet50", help="timm's name; random weights, 224 pixels")
    parser.add_argument("--candidates", type=int, default=8, choices=list(SPACES), help="a side")
    parser.add_argument("--out", type=Path, default=HERE / "compiling.csv")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.inside:
        quiet(1)
        two_steps(given.network, given.candidates)
        return
    table = Table(given.out, COLUMNS, keys=3)
    if table.has(given.network, given.candidates, "warm"):
        return
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm"):
            found = alone(given.network, given.candidates, Path(folder))
            if not table.has(given.network, given.candidates, cache):
                table.add(given.network, given.candidates, cache, *found)


if __name__ == "__main__":
    main()

"""Benchmarks: what a search costs, as ratios. See README.md here.

    python -m experiments.benchmarks.run --threads 2
    python -m experiments.benchmarks.run --summary

Rows are appended to results.csv as they are found; rows that are there already are not computed
again. Every measurement runs in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from math import nan
from pathlib import Path

from experiments.benchmarks import memory, tables
from experiments.benchmarks.measure import OUT_OF_MEMORY, PARTS, SPACES, Job, Row
from experiments.benchmarks.networks import NETWORKS
from experiments.benchmarks.steps import FLOAT, STEPS
from experiments.harness import Table

HERE = Path(__file__).parent
KEYS = ("device", "threads", "network", "candidates", "part", "images", "steps", "row")
COLUMNS = (*KEYS, "ratio", "low", "high", "value", "count", "note")
OVER_A_SET = ("calibration", "search")
"""Parts whose last row has their own name; the others have a row for each step."""


def key_of(job: Job, row: str) -> tuple[object, ...]:
    """What identifies a row; what its part does not depend on is left empty."""
    images = job.images if job.part in OVER_A_SET else ""
    steps = job.steps if job.part == "search" else ""
    return job.device, job.threads, job.network, job.candidates, job.part, images, steps, row


def missing(job: Job, table: Table) -> Job | None:
    """The job with those rows alone that are not in the table; None if that is all."""
    wanted = (job.part,) if job.part in OVER_A_SET else job.rows
    left = tuple(row for row in wanted if not table.has(*key_of(job, row)))
    return replace(job, rows=left) if left else None


def alone(job: Job) -> list[Row]:
    """The rows of a job, from a process of its own; without one of them where it was killed."""
    extra = memory.ENVIRONMENT if job.part == "memory" else {}
    threads = {"OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
    command = [sys.executable, "-m", "experiments.benchmarks.measure", json.dumps(asdict(job))]
    ended = subprocess.run(command, env={**os.environ, **extra, **threads}, stdout=subprocess.PIPE, text=True)
    if ended.returncode == -9:  # as the kernel does where memory runs out
        return [Row(row, nan, nan, nan, nan, 0, OUT_OF_MEMORY) for row in job.rows]
    if ended.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with {ended.returncode}")
    return [Row(**row) for row in json.loads(ended.stdout.splitlines()[-1])]


def memory_rows(job: Job) -> Iterator[Row]:
    """Peaks relative to the float step's, each from a process of its own."""
    (float_row,) = alone(replace(job, rows=(FLOAT,)))
    yield replace(float_row, ratio=1.0, low=1.0, high=1.0)
    for name in job.rows:
        if name != FLOAT:
            (row,) = alone(replace(job, rows=(name,)))
            ratio = row.value / float_row.value
            yield replace(row, ratio=ratio, low=ratio, high=ratio)


def fill(table: Table, jobs: Sequence[Job]) -> None:
    """Compute the rows that are missing."""
    for job in jobs:
        left = missing(job, table)
        if left is None:
            continue
        for row in memory_rows(left) if job.part == "memory" else alone(left):
            key = key_of(job, row.name)
            if not table.has(*key):
                table.add(*key, row.ratio, row.low, row.high, row.value, row.count, row.note)


def arguments_of(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--candidates", type=int, nargs="+", default=list(SPACES), choices=list(SPACES))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument(
        "--rows", nargs="+", default=list(STEPS), choices=list(STEPS), help="of step and memory"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=9, help="interleaved repetitions, at least")
    parser.add_argument("--images", type=int, default=256, help="in the calibration set")
    parser.add_argument("--steps", type=int, default=Job.steps, help="of a whole search")
    parser.add_argument("--out", type=Path, default=HERE / "results.csv")
    parser.add_argument("--summary", action="store_true", help="print the rows that are there as tables")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Compute what is missing, then print the tables."""
    given = arguments_of(argv)
    if not given.summary:
        combinations = itertools.product(given.parts, given.candidates, given.models)
        jobs = [
            Job(
                part,
                network,
                candidates,
                tuple(given.rows),
                device=given.device,
                threads=given.threads,
                rounds=given.rounds,
                images=given.images,
                steps=given.steps,
            )
            for part, candidates, network in combinations
        ]
        fill(Table(given.out, COLUMNS, keys=len(KEYS)), jobs)
    print("\n".join(tables.summary(given.out)))


if __name__ == "__main__":
    main()

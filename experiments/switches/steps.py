"""Time and peak memory of a step with a switch on, against the same step without; run.py starts it."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import nan
from statistics import median

import torch

from dqss.blocks import AUTO
from dqss.lit.schedules import MeanFieldSchedule
from dqss.lit.settling import Settled, Settling
from dqss.recompute import recomputing
from dqss.search_spaces.studies import eight
from experiments.benchmarks import memory
from experiments.benchmarks.measure import Row
from experiments.benchmarks.networks import NETWORKS
from experiments.benchmarks.steps import BATCH, IMAGES, SearchStep, calibrated
from experiments.benchmarks.timing import Ratio, interleave
from experiments.harness import quiet

PLAIN = "search"
STEPS = (PLAIN, "recompute", "frozen: a half", "frozen: all but one")
MEMORY = (PLAIN, "recompute", "frozen: a half")
DEVICE = torch.device("cpu")
ROUNDS, WARM_UP, MEBIBYTE = 9, 3, 2**20


@dataclass(frozen=True)
class Job:
    """What a process measures.

    Attributes:
        network: a key of :data:`experiments.benchmarks.networks.NETWORKS`.
        part: ``step`` or ``memory``.
        rows: of :data:`STEPS`; the first is what others are relative to.
    """

    network: str
    part: str
    rows: tuple[str, ...]


def make(job: Job, name: str, stack: ExitStack) -> SearchStep:
    """A step of the search at W8A8 with eight candidates a side; ``stack`` keeps its switch on."""
    source = NETWORKS[job.network]
    evaluator = calibrated(source.build(), source.inputs(IMAGES), eight(8), DEVICE)
    step = SearchStep(evaluator, MeanFieldSchedule(), fuse=True)
    decisions = list(evaluator.supernet.decisions.values())
    if name == "recompute":
        stack.enter_context(recomputing(evaluator.supernet, (AUTO,)))
    elif name != PLAIN:
        frozen = decisions[::2] if name == "frozen: a half" else decisions[1:]
        step.module.settled = Settled(decisions, Settling(margin=1.0, patience=1))
        step.module.settled.load_state_dict({decision.name: (0, 1) for decision in frozen})
    return step


def times(job: Job, stack: ExitStack) -> list[Row]:
    """All steps in turn, round by round."""
    steps = {name: make(job, name, stack) for name in job.rows}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    found = interleave(steps, ROUNDS, DEVICE, least_seconds=20)
    ratios = {name: Ratio.of(seconds, found[PLAIN]) for name, seconds in found.items()}
    return [
        Row(name, ratio.median, ratio.low, ratio.high, median(found[name]), len(found[name]))
        for name, ratio in ratios.items()
    ]


def peak(job: Job, stack: ExitStack) -> list[Row]:
    """Peak memory of one kind of step above the network's own."""
    (name,) = job.rows
    step, source = make(job, name, stack), NETWORKS[job.network]
    for _ in range(WARM_UP):
        step()
    own = memory.own_tensors(source.build(), source.inputs(IMAGES))
    found = memory.peak_of(step, step.optimizer.zero_grad, own, DEVICE)
    note = f"{found.passing / MEBIBYTE:.1f} MiB in passing, {found.kept / MEBIBYTE:.1f} MiB kept"
    return [Row(name, nan, nan, nan, found.total / MEBIBYTE, 3, f"batch {BATCH}; {note}")]


def main() -> None:
    """Measure the job given and print its rows."""
    given = json.loads(sys.argv[1])
    job = Job(**{**given, "rows": tuple(given["rows"])})
    quiet(1)
    with ExitStack() as stack:
        rows = (times if job.part == "step" else peak)(job, stack)
    print(json.dumps([asdict(row) for row in rows]), flush=True)


if __name__ == "__main__":
    main()

"""What one process of the benchmarks measures; :mod:`experiments.benchmarks.run` starts it.

    python -m experiments.benchmarks.measure JOB

JOB is a :class:`Job` as JSON. The last line of what it prints is a list of :class:`Row`.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import nan
from statistics import median

import torch
from torch import Tensor, nn

from dqss.discretize import RefineSettings
from dqss.lit.build import build
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.measure import FORWARD_FACTOR
from dqss.progress import Reporter
from dqss.samples import Samples
from dqss.search_spaces import studies
from dqss.space import SearchSpace
from experiments.benchmarks import memory, steps
from experiments.benchmarks.networks import NETWORKS, Network
from experiments.benchmarks.timing import Ratio, clock, interleave, timed
from experiments.harness import preset, quiet

SPACES = {2: studies.two, 4: studies.four, 8: studies.eight, 16: studies.sixteen}
WARM_UP = 3
FLOAT_PASSES = 3
"""Float passes before the searches, and as many after each."""
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Job:
    """What a process measures.

    Attributes:
        part: a key of :data:`PARTS`.
        network: a key of :data:`experiments.benchmarks.networks.NETWORKS`.
        candidates: a side.
        rows: the steps that are wanted, for the parts that have several.
        bits: of weights and inputs.
        device: ``cpu`` or ``cuda``.
        threads: on the CPU.
        rounds: of interleaved repetitions, at least.
        images: of the calibration set, for the parts that run over one.
        steps: of a search.
    """

    part: str
    network: str
    candidates: int
    rows: tuple[str, ...] = steps.STEPS
    bits: int = 8
    device: str = "cpu"
    threads: int = 1
    rounds: int = 9
    images: int = 256
    steps: int = steps.SETTINGS.steps_at(8)

    @property
    def space(self) -> SearchSpace:
        """The search space."""
        return SPACES[self.candidates](self.bits)

    @property
    def source(self) -> Network:
        """The network."""
        return NETWORKS[self.network]

    @property
    def home(self) -> torch.device:
        """The device."""
        return torch.device(self.device)


@dataclass(frozen=True)
class Row:
    """A ratio, and what it came from.

    Attributes:
        name: of the row.
        ratio, low, high: median and quartiles; what they are relative to is the part's.
        value: median in seconds, or mebibytes.
        count: repetitions.
        note: what else there is to know.
    """

    name: str
    ratio: float
    low: float
    high: float
    value: float
    count: int
    note: str = ""


OUT_OF_MEMORY = "out of memory"


def step_rows(job: Job) -> list[Row]:
    """Steps against the float step, interleaved."""
    images = job.source.inputs(steps.IMAGES)

    def evaluator(model: nn.Module) -> Callable[[], steps.Evaluator]:
        return lambda: steps.calibrated(model, images, job.space, job.home)

    # What the logits are costs no time: the steps of the search share one supernet.
    shared = functools.cache(evaluator(job.source.build()))
    works, lost = {}, []
    for name in dict.fromkeys((steps.FLOAT, *job.rows)):
        model = job.source.build()
        try:
            step = _step(job, name, model, images, shared if name in steps.SEARCHES else evaluator(model))
            for _ in range(WARM_UP):
                step()
            works[name] = step
        except (RuntimeError, MemoryError) as error:
            lost.append(_lost(name, error))
    found = interleave(works, job.rounds, job.home, least_seconds=20)
    return [_timed_row(name, found[name], found[steps.FLOAT]) for name in works] + lost


def memory_rows(job: Job) -> list[Row]:
    """Peak memory of one step above the network's own; the ratio is left to who knows the float step's."""
    (name,) = job.rows
    images = job.source.inputs(steps.IMAGES)
    model = job.source.build()  # which the user has, beside the copy that is searched on
    own = memory.own_tensors(model, images)
    try:
        step = _step(job, name, model, images, lambda: steps.calibrated(model, images, job.space, job.home))
        for _ in range(WARM_UP):
            step()
        peak = memory.peak_of(step, step.optimizer.zero_grad, own, job.home)
    except (RuntimeError, MemoryError) as error:
        return [_lost(name, error)]
    note = f"{peak.passing / MEBIBYTE:.1f} MiB in passing, {peak.kept / MEBIBYTE:.1f} MiB kept"
    return [Row(name, nan, nan, nan, peak.total / MEBIBYTE, 3, note)]


def calibration_rows(job: Job) -> list[Row]:
    """Preparation and calibration of all candidates against a float pass over the same images."""
    images, model = job.source.inputs(job.images), job.source.build()
    count = job.images
    # Nearly all inputs, where a search leaves a fifth for its selection.
    settings = PTQSettings(batch_size=steps.BATCH, parts=((count - 1) / count, 1 / count))
    samples = Samples.of(images)

    def calibrate(inputs: Samples = samples) -> None:
        build(model, inputs, job.space, settings, 0, None, job.home, Reporter())

    works = {"float pass": _float_pass(job, model, images), "calibration": calibrate}
    works["float pass"]()
    calibrate(samples.subset(range(2 * steps.BATCH)))
    rounds = interleave(works, min(job.rounds, 3), job.home, least_seconds=20)
    return [_timed_row(name, rounds[name], rounds["float pass"]) for name in works]


def search_rows(job: Job) -> list[Row]:
    """Whole searches, with the defaults and fast, and their stages, against a float pass over the set."""
    images, model = job.source.inputs(job.images), job.source.build()
    trainer = {"accelerator": "gpu" if job.home.type == "cuda" else "cpu"}
    short = PTQSettings(steps=2, refine=RefineSettings(passes=1), finalists=1, batch_size=steps.BATCH)
    search_ptq(model, images[: 5 * steps.BATCH], job.space, short, trainer=trainer)  # compiles
    float_pass = _float_pass(job, model, images)
    float_pass()
    passes = [timed(float_pass, job.home) for _ in range(FLOAT_PASSES)]
    found = []
    for name, settings in {"search": preset("ptq"), "search, fast": preset("ptq_fast")}.items():
        if name == "search":
            settings = replace(settings, steps=job.steps)
        now = clock(job.home)
        started, began = now(), time.perf_counter()
        result = search_ptq(model, images, job.space, settings, trainer=trainer)
        stages = {name: now() - started}
        share = stages[name] / (time.perf_counter() - began)  # the search looks at the clock on the wall
        stages |= {f"{name}: {stage}": share * spent for stage, spent in result.metrics["seconds"].items()}
        counted = (
            f"{len(result.history)} steps; counted: {result.metrics['evaluations'] / job.images:.1f} passes"
        )
        found += [(stage, spent, counted) for stage, spent in stages.items()]
        passes += [timed(float_pass, job.home) for _ in range(FLOAT_PASSES)]
    unit = median(passes)
    return [
        Row("float pass", 1.0, min(passes) / unit, max(passes) / unit, unit, len(passes)),
        *(
            Row(name, spent / unit, spent / max(passes), spent / min(passes), spent, 1, counted)
            for name, spent, counted in found
        ),
    ]


PARTS: dict[str, Callable[[Job], list[Row]]] = {
    "step": step_rows,
    "memory": memory_rows,
    "calibration": calibration_rows,
    "search": search_rows,
}


def measure(job: Job) -> list[Row]:
    """The rows of a job."""
    if job.home.type == "cpu":
        memory.limit_to_available()
    return PARTS[job.part](job)


def _step(
    job: Job, name: str, model: nn.Module, images: Tensor, evaluator: Callable[[], steps.Evaluator]
) -> steps.Step:
    if name == steps.FLOAT:
        model.to(job.home)
    return steps.make(name, model, images[: steps.BATCH].to(job.home), evaluator)


def _float_pass(job: Job, model: nn.Module, images: Tensor) -> Callable[[], None]:
    """The network as it was given, over all images, in batches of the size that calibration takes."""
    network = job.source.build().to(job.home) if job.home.type != "cpu" else model

    @torch.no_grad()
    def run() -> None:
        for batch in images.split(steps.BATCH * FORWARD_FACTOR):
            network(batch.to(job.home))

    return run


def _timed_row(name: str, seconds: Sequence[float], reference: Sequence[float]) -> Row:
    ratio = Ratio.of(seconds, reference)
    return Row(name, ratio.median, ratio.low, ratio.high, median(seconds), len(seconds))


def _lost(name: str, error: Exception) -> Row:
    """The row of what did not fit; oneDNN says no more than that a primitive could not be made or run."""
    if isinstance(error, RuntimeError) and not any(word in str(error) for word in ("memory", "primitive")):
        raise error
    return Row(name, nan, nan, nan, nan, 0, OUT_OF_MEMORY)


def main() -> None:
    """Measure the job given and print its rows."""
    given = json.loads(sys.argv[1])
    job = Job(**{**given, "rows": tuple(given["rows"])})
    quiet(job.threads)
    print(json.dumps([asdict(row) for row in measure(job)]), flush=True)


if __name__ == "__main__":
    main()

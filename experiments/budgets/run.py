"""Study: bits and algorithms searched together, or one of them, or neither? See README.md here.

    python -m experiments.budgets.run --data FOLDER

FOLDER holds ``train_jpeg.npz``, ``test_jpeg.npz`` and ``resnet20-12fca82f.th``. Rows are appended
to results.csv as they are found; rows that are there already are not computed again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dqss.budget import Budget, Limits
from dqss.lit.build import build, limits_of
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.measure import Evaluator, Meter
from dqss.models.factory import cifar_resnet
from dqss.progress import Reporter
from dqss.samples import Samples
from dqss.search_spaces import uniform
from dqss.space import SearchSpace
from dqss.spec import Candidate
from dqss.supernet import Assignment, Supernet
from dqss.uniform import screen, uniform_assignments
from experiments.budgets import baselines
from experiments.cifar_resnet20.run import DEV, read
from experiments.harness import CPU, HeldOut, Table, quiet, summarize

HERE = Path(__file__).parent
COLUMNS = ("bits", "seed", "row", "kl", "top1", "dev_kl", "average_bits", "evaluations", "seconds")
CALIBRATION = 512
WIDTHS = (2, 3, 4, 5, 6, 8)
WEIGHTS = ("minmax", {"name": "percentile", "p": 99.0}, "mse", {"name": "lp", "p": 3.0})
ACTIVATIONS = ("minmax", {"name": "percentile", "p": 99.9}, "mse", "aciq_laplace")
DRAWS, PROBED = 5, 128

SEARCHED = ("joint", "bits_only", "algorithm_only")
SCORED = ("sqnr", "hessian", "random", "greedy")
ROWS = ("float", "best_uniform", *SCORED, *SEARCHED)


def space(widths: tuple[int, ...], weight: object = WEIGHTS, activation: object = ACTIVATIONS) -> SearchSpace:
    """Weights per channel and symmetric at ``widths``, activations per tensor and affine at eight bits."""
    return uniform(list(widths), 8, weight, activation)  # type: ignore[arg-type]


class Study:
    """The network, its data, and what is chosen for a budget.

    Args:
        model: float.
        held_out, dev: images that report, and images that choose defaults.
        calibration: inputs by seed.
        bits: of the budget, on average over the weights.
        settings: of the searches.
    """

    def __init__(
        self,
        model: nn.Module,
        held_out: HeldOut,
        dev: HeldOut,
        calibration: Callable[[int], Samples],
        bits: int,
        settings: PTQSettings,
    ) -> None:
        self.model, self.held_out, self.dev = model, held_out, dev
        self.calibration, self.bits, self.settings = calibration, bits, settings
        self.budget = Budget(average_weight_bits=bits)

    def prepared(self, seed: int) -> tuple[Evaluator, Limits]:
        """A calibrated supernet of all candidates, and the budget on it."""
        samples, device = self.calibration(seed), torch.device("cpu")
        _, evaluator = build(
            self.model, samples, space(WIDTHS), self.settings, seed, None, device, Reporter()
        )
        evaluator.parts = {**evaluator.parts, "refine": range(len(samples))}
        evaluator.batch_size = 64
        evaluator.reference(range(len(samples)))
        evaluator.meter = Meter(len(samples))
        limits = limits_of(self.budget, evaluator)
        assert limits is not None
        return evaluator, limits

    def best_uniform(self, evaluator: Evaluator, bits: int) -> dict[str, int]:
        """The pair of algorithms that is best at one width, on all calibration images."""
        uniform = uniform_assignments(evaluator.supernet)
        at = {
            name: found
            for name, found in uniform.items()
            if name.split(" / ")[0].split("@")[1][0] == str(bits)
        }
        return dict(at[screen(evaluator, at, 1, len(evaluator.samples)).names[0]])

    def measured(
        self, supernet: Supernet, assignment: Assignment, limits: Limits
    ) -> tuple[float, float, float, float]:
        """Divergence and top-1 on what reports, divergence on what chooses, and the average bits."""
        assert limits.hold(assignment)
        found = self.held_out.measure(supernet, assignment)
        average = limits.achieved(assignment)["average_weight_bits"]
        return found.kl, found.top1, self.dev.measure(supernet, assignment).kl, average


Row = tuple[str, float, float, float, float, int, float]


def scored(study: Study, seed: int, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Everything but the searches, all on one supernet."""
    evaluator, limits = study.prepared(seed)
    supernet = evaluator.supernet

    def row(name: str, choose: Callable[[], Assignment]) -> Row:
        evaluator.meter, started = Meter(len(evaluator.samples)), time.perf_counter()
        assignment = choose()
        spent, seconds = evaluator.meter.evaluations, time.perf_counter() - started
        return name, *study.measured(supernet, assignment, limits), spent, seconds

    def greedy() -> Assignment:
        start = study.best_uniform(evaluator, max(WIDTHS))
        scores = baselines.measured(evaluator, start, "refine", PROBED)
        return baselines.greedy(evaluator, start, limits, scores)

    if wanted("best_uniform"):
        yield row("best_uniform", lambda: study.best_uniform(evaluator, study.bits))
    if wanted("sqnr"):
        yield row("sqnr", lambda: limits.solve(baselines.sqnr(evaluator)))
    if wanted("hessian"):
        yield row("hessian", lambda: limits.solve(baselines.hessian(evaluator)))
    if wanted("greedy"):
        yield row("greedy", greedy)
    if wanted("random"):
        draws = [limits.solve(baselines.chance(supernet, 1000 * seed + number)) for number in range(DRAWS)]
        found = [study.measured(supernet, one, limits) for one in draws]
        kl, top1, dev, average = (sum(column) / DRAWS for column in zip(*found, strict=True))
        yield "random", kl, top1, dev, average, 0, 0.0


def searched(study: Study, seed: int, name: str) -> Row:
    """A whole search, as a user would run it, with all candidates or some."""
    started, before = time.perf_counter(), 0
    candidates, budget = space(WIDTHS), study.budget
    if name == "algorithm_only":
        candidates = space((study.bits,))
    if name == "bits_only":
        evaluator, _ = study.prepared(seed)
        best = study.best_uniform(evaluator, study.bits)
        before = evaluator.meter.evaluations
        pair = [_of(evaluator.supernet, best, role) for role in ("weight", "activation")]
        candidates = space(WIDTHS, *([{"name": each.algorithm, **each.kwargs}] for each in pair))
    samples = study.calibration(seed)
    result = search_ptq(
        study.model, samples, candidates, study.settings, seed=seed, trainer=CPU, budget=budget
    )
    seconds = time.perf_counter() - started
    exported = result.discretized.assignments[result.discretized.exported]
    found = study.held_out.measure(result.supernet, exported)
    dev = study.dev.measure(result.supernet, exported).kl
    record = result.bundle.strategy.budget
    assert record is not None
    average = float(record["achieved"]["average_weight_bits"])  # type: ignore[index, call-overload, arg-type]
    return name, found.kl, found.top1, dev, average, before + result.metrics["evaluations"], seconds


def _of(supernet: Supernet, assignment: Assignment, role: str) -> Candidate:
    name = next(name for name in assignment if name.endswith(role))
    option = supernet.decisions[name].options[assignment[name]]
    assert isinstance(option, Candidate)
    return option


def run(study: Study, seeds: list[int], rows: list[str], table: Table) -> None:
    """Compute the rows that are missing."""
    for seed in seeds:

        def missing(row: str, seed: int = seed) -> bool:
            return row in rows and not table.has(study.bits, seed, row)

        if missing("float"):
            table.add(study.bits, seed, "float", 0.0, study.held_out.float().top1, 0.0, 32.0, 0, 0.0)
        if any(missing(row) for row in ("best_uniform", *SCORED)):
            for found in scored(study, seed, missing):
                table.add(study.bits, seed, *found)
        for name in SEARCHED:
            if missing(name):
                table.add(study.bits, seed, *searched(study, seed, name))


def of_cifar(data: Path, bits: int, settings: PTQSettings) -> Study:
    """The study on a CIFAR ResNet-20."""
    model: nn.Module = cifar_resnet(checkpoint=str(data / "resnet20-12fca82f.th")).module
    images, labels = read(data / "test_jpeg.npz")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, dev = (HeldOut(model, images[part], labels[part], 250) for part in (order[DEV:], order[:DEV]))

    def calibration(seed: int) -> Samples:
        with np.load(data / "train_jpeg.npz") as archive:
            available = len(archive["labels"])
        chosen = np.random.default_rng(seed).permutation(available)[:CALIBRATION]
        return Samples.of(read(data / "train_jpeg.npz", chosen)[0])

    return Study(model, held_out, dev, calibration, bits, settings)


def main() -> None:
    """Compute the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4], help="average bits of the weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--out", type=Path, default=HERE / "results.csv")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="sum up the rows that are there")
    arguments = parser.parse_args()
    if arguments.summary:
        return summarize(
            arguments.out, ("bits", "row"), ("kl", "top1", "dev_kl", "average_bits", "evaluations")
        )
    if arguments.data is None:
        parser.error("--data FOLDER is needed")
    quiet(arguments.threads)
    table = Table(arguments.out, COLUMNS, keys=3)
    for bits in arguments.bits:
        study = of_cifar(arguments.data, bits, PTQSettings(discrete_every=0))
        run(study, arguments.seeds, arguments.rows, table)


if __name__ == "__main__":
    main()

"""Study: bits and algorithms searched together, or one of them, or neither? See README.md here.

    python -m experiments.budgets.run resnet20 --data FOLDER
    python -m experiments.budgets.run mobilenetv2 --data FOLDER --checkpoint FILE --targets w6a8

FOLDER holds ``train_jpeg.npz``, ``test_jpeg.npz`` and ``resnet20-12fca82f.th`` (or that of ResNet-56); for
MobileNetV2 ``calibration`` and ``dev``, folders of images. Rows are appended to results.csv as they are
found; rows that are there already are not computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dqss.budget import Budget, Limits, costs
from dqss.budget.workload import Workload, watch
from dqss.discretize import RefineSettings
from dqss.lit.build import build, limits_of
from dqss.lit.device import device_of
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
from experiments.harness import HeldOut, Table, add_accelerator, quiet, study_parser, summarize
from experiments.imagenet_mobile.run import Network

HERE = Path(__file__).parent
COLUMNS = ("network", "target", "seed", "row", "kl", "top1", "dev_kl", "cost", "evaluations", "seconds")
KEYS = 4
CALIBRATION = 512
WIDTHS, FEW_WIDTHS = (2, 3, 4, 5, 6, 8), (4, 5, 6, 8)
WEIGHTS = ("minmax", {"name": "percentile", "p": 99.0}, "mse", {"name": "lp", "p": 3.0})
ACTIVATIONS = ("minmax", {"name": "percentile", "p": 99.9}, "mse", "aciq_laplace")
DRAWS, PROBED = 5, 128

SEARCHED = ("joint", "bits_only", "algorithm_only")
SCORED = ("sqnr", "hessian", "random", "greedy")
ROWS = ("float", "best_uniform", *SCORED, *SEARCHED)


@dataclass(frozen=True)
class Target:
    """A budget, as what a uniform strategy of these bits costs.

    Attributes:
        weight, activation: bits of that strategy.
        limit: what is limited.
    """

    weight: int
    activation: int
    limit: str

    def widths(self, widths: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Bits of the candidates for weights and for activations: only BitOPs trade the latter."""
        return widths, widths if self.limit == "bitops" else (self.activation,)

    def budget(self, supernet: Supernet, workload: Workload, uniform: Assignment) -> Budget:
        """The limit on a supernet."""
        if self.limit == "bitops":
            return Budget(bitops=costs.bitops(supernet, workload).of(uniform))
        return Budget(average_weight_bits=self.weight)


TARGETS = {
    "w4a8": Target(4, 8, "average_weight_bits"),
    "w6a8": Target(6, 8, "average_weight_bits"),
    "bitops_w4a4": Target(4, 4, "bitops"),
}


def space(
    weight_bits: tuple[int, ...],
    activation_bits: tuple[int, ...],
    weight: object = WEIGHTS,
    activation: object = ACTIVATIONS,
) -> SearchSpace:
    """Weights per channel and symmetric, activations per tensor and affine."""
    return uniform(list(weight_bits), list(activation_bits), weight, activation)  # type: ignore[arg-type]


class Study:
    """The network, its data, and what is chosen for a budget.

    Args:
        name: of the network.
        model: float.
        held_out, dev: images that report, and images that choose defaults (None: there are none).
        calibration: inputs by seed.
        widths: of the candidates.
        settings: of the searches.
        accelerator: where all of it runs.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        held_out: HeldOut,
        dev: HeldOut | None,
        calibration: Callable[[int], Samples],
        widths: tuple[int, ...],
        settings: PTQSettings,
        accelerator: str = "cpu",
    ) -> None:
        self.name, self.model, self.held_out, self.dev = name, model, held_out, dev
        self.calibration, self.widths, self.settings = calibration, widths, settings
        self.trainer = {"accelerator": accelerator}

    def prepared(self, target: Target, seed: int) -> Prepared:
        """A calibrated supernet of all candidates, and the budget on it."""
        samples, device = self.calibration(seed), device_of(self.trainer)
        candidates = space(*target.widths(self.widths))
        _, evaluator = build(self.model, samples, candidates, self.settings, seed, None, device, Reporter())
        evaluator.parts = {**evaluator.parts, "refine": range(len(samples))}
        evaluator.batch_size = min(64, self.held_out.batch_size)
        evaluator.reference(range(len(samples)))
        uniform = uniform_at(evaluator.supernet, target)
        work = watch(evaluator.supernet, samples.batch([0]).to(device))
        budget = target.budget(evaluator.supernet, work, next(iter(uniform.values())))
        limits = limits_of(budget, evaluator)
        assert limits is not None
        evaluator.meter = Meter(len(samples))
        return Prepared(evaluator, budget, limits, uniform)

    def measured(self, supernet: Supernet, assignment: Assignment) -> tuple[float, float, float]:
        """Divergence and top-1 on what reports, and divergence on what chooses."""
        found = self.held_out.measure(supernet, assignment)
        dev = float("nan") if self.dev is None else self.dev.measure(supernet, assignment).kl
        return found.kl, found.top1, dev


@dataclass
class Prepared:
    """What all rows of a target and seed begin from."""

    evaluator: Evaluator
    budget: Budget
    limits: Limits
    uniform: dict[str, Assignment]

    def best_uniform(self) -> dict[str, int]:
        """The pair of algorithms that is best at the target's own bits, on all calibration images."""
        found = screen(self.evaluator, self.uniform, 1, len(self.evaluator.samples))
        return dict(self.uniform[found.names[0]])

    def cost(self, assignment: Assignment) -> float:
        """Of what is limited; never above it."""
        assert self.limits.hold(assignment)
        return self.limits.limits[0].cost.of(assignment)


def uniform_at(supernet: Supernet, target: Target) -> dict[str, Assignment]:
    """The uniform strategies with the bits of a target."""
    wanted = [str(target.weight), str(target.activation)]
    found = uniform_assignments(supernet)
    return {
        name: one
        for name, one in found.items()
        if [part.split("@")[1].split()[0] for part in name.split(" / ")] == wanted
    }


Row = tuple[str, float, float, float, float, int, float]


def scored(study: Study, target: Target, seed: int, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Everything but the searches, all on one supernet."""
    begun = study.prepared(target, seed)
    evaluator, limits, supernet = begun.evaluator, begun.limits, begun.evaluator.supernet

    def row(name: str, choose: Callable[[], Assignment]) -> Row:
        evaluator.meter, started = Meter(len(evaluator.samples)), time.perf_counter()
        assignment = choose()
        spent, seconds = evaluator.meter.evaluations, time.perf_counter() - started
        return name, *study.measured(supernet, assignment), begun.cost(assignment), spent, seconds

    def greedy() -> Assignment:
        bits = [max(each) for each in target.widths(study.widths)]
        widest = uniform_at(supernet, Target(bits[0], bits[1], target.limit))
        start = dict(widest[screen(evaluator, widest, 1, len(evaluator.samples)).names[0]])
        scores = baselines.measured(evaluator, start, "refine", PROBED)
        return baselines.greedy(evaluator, start, limits, scores)

    if wanted("best_uniform"):
        yield row("best_uniform", begun.best_uniform)
    if wanted("sqnr"):
        yield row("sqnr", lambda: limits.solve(baselines.sqnr(evaluator)))
    if wanted("hessian"):
        yield row("hessian", lambda: limits.solve(baselines.hessian(evaluator)))
    if wanted("greedy"):
        yield row("greedy", greedy)
    if wanted("random"):
        draws = [limits.solve(baselines.chance(supernet, 1000 * seed + number)) for number in range(DRAWS)]
        found = [(*study.measured(supernet, one), begun.cost(one)) for one in draws]
        kl, top1, dev, cost = (sum(column) / DRAWS for column in zip(*found, strict=True))
        yield "random", kl, top1, dev, cost, 0, 0.0


def searched(study: Study, target: Target, seed: int, name: str) -> Row:
    """A whole search, as a user would run it, with all candidates or some."""
    widths, before, started = target.widths(study.widths), 0, time.perf_counter()
    candidates, budget = space(*widths), Budget(average_weight_bits=target.weight)
    if name == "bits_only" or target.limit == "bitops":
        begun = study.prepared(target, seed)
        budget = begun.budget
    if name == "algorithm_only":
        candidates = space((target.weight,), (target.activation,))
    if name == "bits_only":
        best = begun.best_uniform()
        before = begun.evaluator.meter.evaluations
        pair = [_of(begun.evaluator.supernet, best, role) for role in ("weight", "activation")]
        candidates = space(*widths, *([{"name": each.algorithm, **each.kwargs}] for each in pair))
    result = search_ptq(
        study.model,
        study.calibration(seed),
        candidates,
        study.settings,
        seed=seed,
        trainer=study.trainer,
        budget=budget,
    )
    seconds = time.perf_counter() - started
    exported = result.discretized.assignments[result.discretized.exported]
    record: Any = result.bundle.strategy.budget
    cost = record["achieved"][target.limit]
    assert cost <= budget.given()[target.limit]
    measured = study.measured(result.supernet, exported)
    return name, *measured, cost, before + result.metrics["evaluations"], seconds


def _of(supernet: Supernet, assignment: Assignment, role: str) -> Candidate:
    name = next(name for name in assignment if name.endswith(role))
    option = supernet.decisions[name].options[assignment[name]]
    assert isinstance(option, Candidate)
    return option


def run(study: Study, targets: Sequence[str], seeds: list[int], rows: list[str], table: Table) -> None:
    """Compute the rows that are missing."""
    for name in targets:
        target = TARGETS[name]
        for seed in seeds:
            key = (study.name, name, seed)

            def missing(row: str, key: tuple[object, ...] = key) -> bool:
                return row in rows and not table.has(*key, row)

            if missing("float"):
                table.add(*key, "float", 0.0, study.held_out.float().top1, 0.0, 0.0, 0, 0.0)
            if any(missing(row) for row in ("best_uniform", *SCORED)):
                for found in scored(study, target, seed, missing):
                    table.add(*key, *found)
            for row in SEARCHED:
                if missing(row):
                    table.add(*key, *searched(study, target, seed, row))


CHECKPOINTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}


def of_cifar(name: str, data: Path, settings: PTQSettings, accelerator: str = "cpu") -> Study:
    """The study on a CIFAR ResNet."""
    loaded = cifar_resnet(name, checkpoint=str(data / CHECKPOINTS[name]))
    model: nn.Module = loaded.module
    images, labels = read(data / "test_jpeg.npz")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, dev = (HeldOut(model, images[part], labels[part], 250) for part in (order[DEV:], order[:DEV]))

    def calibration(seed: int) -> Samples:
        with np.load(data / "train_jpeg.npz") as archive:
            available = len(archive["labels"])
        chosen = np.random.default_rng(seed).permutation(available)[:CALIBRATION]
        return Samples.of(read(data / "train_jpeg.npz", chosen)[0])

    return Study(name, model, held_out, dev, calibration, WIDTHS, settings, accelerator)


def of_mobilenet(checkpoint: Path, data: Path, settings: PTQSettings, accelerator: str) -> Study:
    """The study on MobileNetV2 and real images; all calibration images for every seed."""
    network = Network("mobilenet", checkpoint, data)
    settings = replace(settings, refine=RefineSettings(passes=4, program_passes=10))  # it takes long
    return Study(
        "mobilenetv2",
        network.model,
        network.held_out,
        None,
        lambda seed: network.samples,
        FEW_WIDTHS,
        settings,
        accelerator,
    )


def main() -> None:
    """Compute the rows that are missing."""
    parser = study_parser(__doc__, HERE / "results.csv")
    add_accelerator(parser)
    parser.add_argument("network", choices=[*CHECKPOINTS, "mobilenetv2"], nargs="?")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="mobilenet_v2-b0353104.pth")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    arguments = parser.parse_args()
    if arguments.summary:
        shown = ("kl", "top1", "dev_kl", "cost", "evaluations", "seconds")
        return summarize(arguments.out, ("network", "target", "row"), shown)
    if arguments.network is None or arguments.data is None:
        parser.error("a network and --data FOLDER are needed")
    quiet(arguments.threads)
    settings = PTQSettings(discrete_every=0)
    if arguments.network in CHECKPOINTS:
        study = of_cifar(arguments.network, arguments.data, settings, arguments.accelerator)
    else:
        study = of_mobilenet(arguments.checkpoint, arguments.data, settings, arguments.accelerator)
    run(study, arguments.targets, arguments.seeds, arguments.rows, Table(arguments.out, COLUMNS, KEYS))


if __name__ == "__main__":
    main()

"""Study: are two strategies of one budget different at all? On all images that nothing was chosen with.

    python -m experiments.budgets.elsewhere resnet56 --data FOLDER --targets w6a8

The rows of ``run.py`` report on 2,000 test images, of which some hundred decide the divergence where there is
little of it. This measures the same strategies on the images of the train file that the seed did not draw as
well. Rows are appended to elsewhere.csv; those that are there are not computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.supernet import Assignment, Supernet
from experiments.budgets import baselines
from experiments.budgets.run import CALIBRATION, CHECKPOINTS, TARGETS, Study, of_cifar, space
from experiments.cifar_resnet20.run import read
from experiments.harness import HeldOut, Table, quiet, study_parser, summarize

HERE = Path(__file__).parent
COLUMNS = (
    "network", "target", "seed", "row", "test_kl", "train_kl", "all_kl", "top1", "images",
    "gain", "gain_low", "gain_high",
)  # fmt: skip
ROWS = ("hessian", "joint")


def unseen(study: Study, data: Path, seed: int) -> HeldOut:
    """The images of the train file that the seed did not draw."""
    file = data / "train_jpeg.npz"
    with np.load(file) as archive:
        available = len(archive["labels"])
    rest = np.random.default_rng(seed).permutation(available)[CALIBRATION:]
    return HeldOut(study.model, *read(file, rest), 250)


def strategies(study: Study, target: str, seed: int) -> Iterator[tuple[str, Supernet, Assignment]]:
    """Every row: those of ``run.py`` of the same names."""
    begun = study.prepared(TARGETS[target], seed)
    evaluator = begun.evaluator
    yield "hessian", evaluator.supernet, begun.limits.solve(baselines.hessian(evaluator))
    candidates = space(*TARGETS[target].widths(study.widths))
    options = {"seed": seed, "trainer": study.trainer, "budget": begun.budget}
    result = search_ptq(study.model, study.calibration(seed), candidates, study.settings, **options)  # type: ignore[arg-type]
    found = result.discretized
    yield "joint", result.supernet, found.assignments[found.exported]


def main() -> None:
    """Compute the rows that are missing."""
    parser = study_parser(__doc__, HERE / "elsewhere.csv")
    parser.add_argument("network", choices=list(CHECKPOINTS), nargs="?")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--targets", nargs="+", default=["w6a8"], choices=TARGETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if arguments.summary:
        return summarize(arguments.out, ("network", "target", "row"), ("test_kl", "train_kl", "all_kl"))
    if arguments.network is None or arguments.data is None:
        parser.error("a network and --data FOLDER are needed")
    quiet(arguments.threads)
    table = Table(arguments.out, COLUMNS, keys=4)
    study = of_cifar(arguments.network, arguments.data, PTQSettings(discrete_every=0))
    for target in arguments.targets:
        for seed in arguments.seeds:
            key = (study.name, target, seed)
            if all(table.has(*key, row) for row in ROWS):
                continue
            first: Tensor | None = None
            parts = (study.held_out, unseen(study, arguments.data, seed))
            for row, supernet, assignment in strategies(study, target, seed):
                found = [part.measure(supernet, assignment) for part in parts]
                both = torch.cat([one.each for one in found])
                first = both if first is None else first
                top1 = 100 * float(torch.cat([one.right for one in found]).float().mean())
                figures = *(one.kl for one in found), float(both.mean()), top1
                if not table.has(*key, row):
                    table.add(*key, row, *figures, len(both), *interval(both - first))


def interval(difference: Tensor) -> tuple[float, float, float]:
    """Mean and its 95 % interval, paired, by the normal approximation."""
    mean = float(difference.double().mean())
    half = 1.96 * float(difference.double().std()) / len(difference) ** 0.5
    return mean, mean - half, mean + half


if __name__ == "__main__":
    main()

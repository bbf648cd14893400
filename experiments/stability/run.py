"""Study: do other images, or fewer of them, give another strategy? See README.md here.

    python -m experiments.stability.run --data FOLDER
    python -m experiments.stability.run --summary

FOLDER is that of experiments/cifar_resnet20. Rows are appended to results.csv as they are found;
rows that are there already are not computed again.
"""

from __future__ import annotations

import csv
import itertools
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.search_spaces.studies import eight
from experiments.cifar_resnet20.run import Study
from experiments.harness import CPU, Table, quiet, study_parser

HERE = Path(__file__).parent
COLUMNS = ("bits", "images", "subset", "kl", "top1", "best_uniform_kl", "evaluations", "exported", "options")
"""``options``: the chosen option of each decision, one digit each, decisions sorted by name."""


def row(study: Study, bits: int, images: int, subset: int) -> tuple[float, float, float, int, str, str]:
    """A search on ``images`` of one subset; the seed of the search is always the same."""
    calibration = study.calibration(subset, images)
    result = search_ptq(study.model, calibration, eight(bits), study.settings, seed=0, trainer=CPU)
    outcome = result.discretized
    chosen = outcome.assignments[outcome.exported]
    found = study.held_out.measure(result.supernet, chosen)
    assert outcome.best_uniform is not None
    uniform = study.held_out.measure(result.supernet, outcome.assignments[outcome.best_uniform])
    options = "".join(str(chosen[name]) for name in sorted(chosen))
    kind = "refined" if outcome.exported == "refined" else "uniform"
    return found.kl, found.top1, uniform.kl, result.metrics["evaluations"], kind, options


def summary(path: Path) -> None:
    """Quality and agreement for each number of images."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    with path.open() as file:
        for found in csv.DictReader(file):
            groups[found["bits"], found["images"]].append(found)
    for (bits, images), rows in groups.items():
        if len(rows) < 2:
            print(f"W{bits}A{bits} {images:>3} images: one subset, nothing to compare it with")
            continue
        kl, top1, uniform = ([float(r[c]) for r in rows] for c in ("kl", "top1", "best_uniform_kl"))
        pairs = list(itertools.combinations([r["options"] for r in rows], 2))
        same = [sum(a == b for a, b in zip(*pair, strict=True)) / len(pair[0]) for pair in pairs]
        print(
            f"W{bits}A{bits} {images:>3} images, {len(rows)} subsets: KL {mean(kl):.3f} +- {stdev(kl):.3f} "
            f"({min(kl):.3f} .. {max(kl):.3f}), top-1 {mean(top1):.1f} +- {stdev(top1):.1f} %, "
            f"best uniform KL {mean(uniform):.3f}, same option in {100 * mean(same):.0f} % of decisions"
        )


def main() -> None:
    """Compute the rows that are missing, or sum up those that are there."""
    parser = study_parser(__doc__, HERE / "results.csv")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--images", type=int, nargs="+", default=[512, 128, 32])
    parser.add_argument("--subsets", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.summary:
        return summary(arguments.out)
    if arguments.data is None:
        parser.error("--data FOLDER is needed")
    quiet(arguments.threads)
    table = Table(arguments.out, COLUMNS, keys=3)
    study = Study(arguments.data, PTQSettings(steps=1200, batch_size=4, discrete_every=0))
    for key in itertools.product(arguments.bits, arguments.images, range(arguments.subsets)):
        if not table.has(*key):
            table.add(*key, *row(study, *key))


if __name__ == "__main__":
    main()

"""Study: does quality fall as candidates are added? See README.md here.

    python -m experiments.candidates.run --data FOLDER

FOLDER is that of experiments/cifar_resnet20. Rows are appended to results.csv as they are found;
rows that are there already are not computed again.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.search_spaces import studies
from experiments.cifar_resnet20.run import Study
from experiments.harness import CPU, Table, quiet, study_parser, summarize

HERE = Path(__file__).parent
SPACES = {"two": studies.two, "eight": studies.eight, "sixteen": studies.sixteen}
COLUMNS = (
    "bits",
    "space",
    "seed",
    "kl",
    "top1",
    "best_uniform_kl",
    "best_uniform_top1",
    "evaluations",
    "seconds",
)


def row(study: Study, bits: int, space: str, seed: int) -> tuple[float, float, float, float, int, float]:
    """A search among the candidates of ``space``."""
    started = time.perf_counter()
    calibration = study.calibration(seed)
    result = search_ptq(study.model, calibration, SPACES[space](bits), study.settings, seed=seed, trainer=CPU)
    seconds, outcome = time.perf_counter() - started, result.discretized
    assert outcome.best_uniform is not None
    found, uniform = (
        study.held_out.measure(result.supernet, outcome.assignments[name])
        for name in (outcome.exported, outcome.best_uniform)
    )
    return found.kl, found.top1, uniform.kl, uniform.top1, result.metrics["evaluations"], seconds


def main() -> None:
    """Compute the rows that are missing."""
    parser = study_parser(__doc__, HERE / "results.csv")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=list(SPACES))
    arguments = parser.parse_args()
    if arguments.summary:
        return summarize(arguments.out, COLUMNS[:2], COLUMNS[3:-1])
    if arguments.data is None:
        parser.error("--data FOLDER is needed")
    quiet(arguments.threads)
    table = Table(arguments.out, COLUMNS, keys=3)
    study = Study(arguments.data, PTQSettings(steps=1200, batch_size=4, discrete_every=0))
    for bits, seed, space in itertools.product(arguments.bits, arguments.seeds, arguments.spaces):
        if not table.has(bits, space, seed):
            table.add(bits, space, seed, *row(study, bits, space, seed))


if __name__ == "__main__":
    main()

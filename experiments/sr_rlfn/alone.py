"""Study: which tensors of RLFN lose what eight bits lose? See README.md here.

    python -m experiments.sr_rlfn.alone --data FOLDER
    python -m experiments.sr_rlfn.alone --data FOLDER --smooth --out experiments/sr_rlfn/alone_smoothed.csv

Squared error of the output on 16 patches with one tensor at eight bits and all others at sixteen (``mse`` for
everything), and PSNR on Set5 with weights, inputs or both at eight bits. Written to alone.csv.
"""

from __future__ import annotations

from pathlib import Path

from dqss.lit.build import build
from dqss.lit.device import device_of
from dqss.lit.settings import PTQSettings
from dqss.progress import Reporter
from dqss.search_spaces import uniform
from dqss.supernet import Assignment
from dqss.uniform import uniform_assignments
from experiments.harness import CPU, Table, quiet, study_parser
from experiments.sr_rlfn.run import Study

HERE = Path(__file__).parent
PATCHES = 16


def main() -> None:
    """Compute all rows."""
    parser = study_parser(__doc__, HERE / "alone.csv")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--smooth", action="store_true", help="first smooth ranges of channels")
    arguments = parser.parse_args()
    quiet(arguments.threads)
    study = Study(arguments.data, PTQSettings(batch_size=2, discrete_every=0, smooth=arguments.smooth))
    space = uniform([8, 16], [8, 16], ["mse"], ["mse"])
    found = build(study.model, study.patches(0), space, study.settings, 0, None, device_of(CPU), Reporter())
    evaluator, supernet = found[1], found[1].supernet

    def at(weight: int, activation: int) -> Assignment:
        bits = (f"@{weight} ", f"@{activation} ")
        found = {tuple(name.split(" / ")): each for name, each in uniform_assignments(supernet).items()}
        return next(
            each for name, each in found.items() if all(b in part for b, part in zip(bits, name, strict=True))
        )

    table = Table(arguments.out, ("tensor", "mse", "set5"), 1)
    narrow, wide = at(8, 8), at(16, 16)
    for name, assignment in {
        "all": narrow,
        "weights": at(8, 16),
        "inputs": at(16, 8),
        "none": wide,
    }.items():
        with supernet.assign(assignment):
            set5 = study.psnr(supernet, "Set5")
        table.add(name, evaluator.measure(assignment, "search", PATCHES), set5)
    alone = {
        name: evaluator.measure({**wide, name: narrow[name]}, "search", PATCHES)
        for name in supernet.decisions
    }
    for name in sorted(alone, key=lambda name: -alone[name]):
        table.add(name, alone[name], "")


if __name__ == "__main__":
    main()

"""Study: would a search at six bits begin well from what options are estimated to cost? See README.md here.

    python -m experiments.sr_rlfn.starts --data FOLDER
    python -m experiments.sr_rlfn.starts --data FOLDER --smooth

The strategy of the least estimates (:mod:`dqss.sensitivity`, relative to the float tensors, drawn towards
what the mean curvature says) beside uniform ones: squared error on the patches that the estimates are made
on, on the six of the selection, and on 32 others; and what the estimates promise. ``oracle``: estimates made
on the others themselves. Written to starts.csv.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dqss.io import Journal
from dqss.lit.build import build
from dqss.lit.device import device_of
from dqss.lit.settings import PTQSettings
from dqss.measure import Meter
from dqss.mixed import MixedWeight
from dqss.progress import Reporter
from dqss.search_spaces import uniform
from dqss.search_spaces.uniform import Algorithms
from dqss.spec import Candidate
from dqss.supernet import Assignment
from experiments.harness import CPU, Table, quiet, study_parser
from experiments.sr_rlfn.run import EDGES, PATCHES, Study

HERE = Path(__file__).parent
WEIGHTS: Algorithms = ["minmax", "mse", {"name": "lp", "p": 3.0}, "adaround"]
ACTIVATIONS: Algorithms = [
    "mse",
    {"name": "percentile", "p": 99.99},
    {"name": "percentile", "p": 99.9},
    {"name": "lp", "p": 3.0},
    "hessian",
]
ADDED = ("adaround", "hessian")
"""What the searches' space does not have."""
OTHER_SEED = 100


class Starts:
    """A calibrated supernet, and other patches beside those that it was calibrated on."""

    def __init__(self, data: Path, bits: int, seed: int, smooth: bool) -> None:
        study = Study(data, PTQSettings(batch_size=2, discrete_every=0, smooth=smooth))
        space = uniform(bits, bits, WEIGHTS, ACTIVATIONS, edges=EDGES, edge_bits=8)
        found = build(
            study.model, study.patches(seed), space, study.settings, seed, None, device_of(CPU), Reporter()
        )
        self.own = found[1]
        parts = {"all": list(range(PATCHES))}
        others = study.patches(OTHER_SEED)
        self.others = replace(
            self.own, samples=others, parts=parts, meter=Meter(), journal=Journal(), references={}
        )
        self.decisions = self.own.supernet.decisions
        self.weights = {q.decision.name for q in self.own.supernet.quantizers() if isinstance(q, MixedWeight)}

    def methods(self, name: str) -> list[str]:
        """Of the options of a decision."""
        options = self.decisions[name].options
        return [option.method for option in options if isinstance(option, Candidate)]

    def pair(self, weight: str, activation: str) -> dict[str, int]:
        """The uniform strategy of two algorithms, with their parameters."""
        return {
            name: self.methods(name).index(weight if name in self.weights else activation)
            for name in self.decisions
        }

    def least(self, costs: Mapping[str, Tensor], without: Collection[str] = ()) -> dict[str, int]:
        """What costs least of each decision."""
        return {
            name: min(
                (k for k, method in enumerate(self.methods(name)) if method not in without),
                key=costs[name].tolist().__getitem__,
            )
            for name in self.decisions
        }

    def estimates(self, around: Assignment) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What each option costs, on the patches that are searched on and on the others."""
        parts = (self.own, "search"), (self.others, "all")
        own, others = (each.second_order(around, part, group=1, alone=True).alone[0] for each, part in parts)
        return own, others

    def measure(self, assignment: Assignment) -> list[float]:
        """Squared error on the patches searched on, on the selection, and on the others."""
        parts = (self.own, "search"), (self.own, "select"), (self.others, "all")
        return [each.measure(assignment, part) for each, part in parts]


def main() -> None:
    """Compute all rows."""
    parser = study_parser(__doc__, HERE / "starts.csv")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smooth", action="store_true", help="first smooth ranges of channels")
    arguments = parser.parse_args()
    quiet(arguments.threads)
    columns = ("bits", "seed", "prepared", "strategy", "searched_on", "selection", "others", "promised")
    table = Table(arguments.out, columns, 4)
    starts = Starts(arguments.data, arguments.bits, arguments.seed, arguments.smooth)
    own, others = starts.estimates(starts.pair("mse", "mse"))
    rows = {
        f"{weight}/{activation}": starts.pair(weight, activation)
        for weight in ("mse", "lp(p=3)", "adaround")
        for activation in ("mse", "hessian")
    }
    rows["least, of clip ranges"] = starts.least(own, ADDED)
    rows["least, of clip ranges, oracle"] = starts.least(others, ADDED)
    rows["least"] = starts.least(own)
    rows["least, oracle"] = starts.least(others)
    key = (arguments.bits, arguments.seed, "smoothed" if arguments.smooth else "plain")
    for name, assignment in rows.items():
        promised = sum(float(own[decision][option]) for decision, option in assignment.items())
        table.add(*key, name, *starts.measure(assignment), promised)


if __name__ == "__main__":
    main()

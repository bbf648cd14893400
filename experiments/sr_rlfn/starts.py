"""Study: would a search at six bits begin well from what options are estimated to cost? See README.md here.

    python -m experiments.sr_rlfn.starts --data FOLDER
    python -m experiments.sr_rlfn.starts --data FOLDER --smooth
    python -m experiments.sr_rlfn.starts --data FOLDER --smooth --switches   # around the best uniform pair

The strategy of the least estimates (:mod:`dqss.sensitivity`, relative to the float tensors, drawn towards
what the mean curvature says) beside uniform ones: squared error on the patches that the estimates are made
on, on the six of the selection, and on 32 others; and what the estimates promise. ``oracle``: estimates made
on the others themselves. Written to starts.csv.

With ``--switches`` something else: every single switch of every decision away from ``adaround/hessian``,
what it gains on the patches searched on and on the 32 others, and what first order says of it (switches.csv);
and what switches gain together that are chosen by one or the other (switches_together.csv).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

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
BEST_PAIR = ("adaround", "hessian")
"""The uniform pair around which single switches are measured."""


@dataclass(frozen=True)
class Gain:
    """By how much the squared error falls, in the mean, and the standard error of that (paired)."""

    mean: float
    error: float

    @staticmethod
    def of(before: list[float], after: list[float]) -> Gain:
        """Of the errors of each patch."""
        differences = [b - a for b, a in zip(before, after, strict=True)]
        return Gain(fmean(differences), stdev(differences) / len(differences) ** 0.5)

    def sure(self, errors: float) -> bool:
        """Whether it is above so many standard errors."""
        return self.mean > errors * self.error


@dataclass(frozen=True)
class OneSwitch:
    """Of one decision to another option."""

    decision: str
    option: int
    method: str
    own: Gain
    others: Gain
    promised: float


def best_of_each(switches: list[OneSwitch], gain: str) -> dict[str, int]:
    """The switch of each decision that gains most on ``own`` or ``others``."""
    ordered = sorted(switches, key=lambda switch: getattr(switch, gain).mean)
    return {switch.decision: switch.option for switch in ordered}


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

    def switches(self, around: Assignment) -> Iterator[OneSwitch]:
        """Every single one."""
        parts = (self.own, "search"), (self.others, "all")
        before = [each.measure_each(around, part) for each, part in parts]
        promised = self.own.first_order(around, "search")
        for name, decision in self.decisions.items():
            outcome = decision.outcome.tolist()
            seen = {outcome[around[name]]}
            for option, method in enumerate(self.methods(name)):
                if outcome[option] in seen:
                    continue
                seen.add(outcome[option])
                trial = {**around, name: option}
                after = [each.measure_each(trial, part) for each, part in parts]
                gains = (Gain.of(b, a) for b, a in zip(before, after, strict=True))
                yield OneSwitch(name, option, method, *gains, -float(promised[name][option]))


def measure_switches(starts: Starts, key: tuple[object, ...]) -> None:
    """Write each switch, and what several gain together."""
    columns = ("decision", "to", "own", "own_error", "others", "others_error", "promised")
    table = Table(HERE / "switches.csv", ("bits", "seed", "prepared", *columns), 5)
    around = starts.pair(*BEST_PAIR)
    found = []
    for switch in starts.switches(around):
        found.append(switch)
        own, others = switch.own, switch.others
        row = (switch.decision, switch.method, own.mean, own.error, others.mean, others.error)
        table.add(*key, *row, switch.promised)
    chosen = {"none": dict[str, int]()}
    for errors in (0, 1, 2, 3):
        sure = [switch for switch in found if switch.own.sure(errors)]
        chosen[f"own, above {errors} standard errors"] = best_of_each(sure, "own")
    both = [switch for switch in found if switch.own.mean > 0 and switch.others.mean > 0]
    chosen["own and others, above 0 (oracle)"] = best_of_each(both, "others")
    sure = [switch for switch in found if switch.own.sure(1) and switch.others.sure(1)]
    chosen["own and others, above 1 standard error (oracle)"] = best_of_each(sure, "others")
    columns = ("bits", "seed", "prepared", "chosen", "switches", "searched_on", "selection", "others")
    together = Table(HERE / "switches_together.csv", columns, 4)
    for name, moves in chosen.items():
        together.add(*key, name, len(moves), *starts.measure({**around, **moves}))


def main() -> None:
    """Compute all rows."""
    parser = study_parser(__doc__, HERE / "starts.csv")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smooth", action="store_true", help="first smooth ranges of channels")
    parser.add_argument(
        "--switches", action="store_true", help="single switches around the best uniform pair"
    )
    arguments = parser.parse_args()
    quiet(arguments.threads)
    columns = ("bits", "seed", "prepared", "strategy", "searched_on", "selection", "others", "promised")
    starts = Starts(arguments.data, arguments.bits, arguments.seed, arguments.smooth)
    key = (arguments.bits, arguments.seed, "smoothed" if arguments.smooth else "plain")
    if arguments.switches:
        return measure_switches(starts, key)
    table = Table(arguments.out, columns, 4)
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
    for name, assignment in rows.items():
        promised = sum(float(own[decision][option]) for decision, option in assignment.items())
        table.add(*key, name, *starts.measure(assignment), promised)


if __name__ == "__main__":
    main()

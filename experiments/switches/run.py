"""Study: what need not run? The switches of a search, for speed and for result. See README.md here.

    python -m experiments.switches.run --data FOLDER
    python -m experiments.switches.run --summary

FOLDER is that of experiments/cifar_resnet20. Rows are appended to searches.csv and steps.csv as they
are found; rows that are there already are not computed again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

from torch import Tensor, nn

from dqss.data.digits import Digits
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.lit.settling import Settling
from dqss.models.factory import digits_resnet20
from dqss.progress import Reporter, Stage
from dqss.samples import Samples
from dqss.search_spaces.studies import eight
from experiments.benchmarks import memory
from experiments.benchmarks.networks import NETWORKS
from experiments.cifar_resnet20.run import Study
from experiments.harness import CPU, HeldOut, Table, quiet
from experiments.switches.steps import MEMORY, PLAIN, STEPS, Job

HERE = Path(__file__).parent
OFF = "off"
LONG = PTQSettings(steps=1200, batch_size=4)
"""What a search of few bits took by default when these rows were made."""
VARIANTS: dict[str, PTQSettings] = {
    OFF: LONG,
    "settle": replace(LONG, settle=Settling(0.9, 50)),
    "settle soon": replace(LONG, settle=Settling(0.8, 25)),
    "stop": replace(LONG, stop_after=10),
    "settle, stop": replace(LONG, settle=Settling(0.9, 50), stop_after=10),
    "recompute": replace(LONG, recompute="auto"),
}
SEARCHES = (
    "task", "seed", "variant", "kl", "top1", "selection_kl", "steps", "frozen",
    "evaluations", "search_cpu", "all_cpu", "options",
)  # fmt: skip
"""``selection_kl``: of the argmax on the selection part. CPU seconds: of the search's steps, and of all.
``options``: of the argmax, one digit each, decisions sorted by name."""
TIMED = ("network", "part", "row", "ratio", "low", "high", "value", "count", "note")


class CpuClock(Reporter):
    """CPU seconds of each stage: on a busy machine they say more than the clock on the wall."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        """See :meth:`Reporter.stage`."""
        started = time.process_time()
        with super().stage(name, total) as stage:
            yield stage
        self.seconds[name] = time.process_time() - started


class Task:
    """A network with its bits, its calibration images, and held-out ones that report."""

    def __init__(self, name: str, data: Path | None) -> None:
        self.bits = 2 if name == "digits" else 4
        self.study = None if name == "digits" else Study(data or Path(), LONG)
        if self.study is None:
            self.digits = Digits()
            self.model: nn.Module = digits_resnet20().module
            validation = self.digits.parts[1]
            images: Tensor = self.digits.normalize(validation.pixels(range(len(validation.labels))))
            self.held_out = HeldOut(self.model, images, validation.labels, 250)
        else:
            self.model, self.held_out = self.study.model, self.study.held_out

    def inputs(self, seed: int) -> Samples:
        """512 calibration images: another choice for each seed."""
        return Digits(seed=seed).calibration() if self.study is None else self.study.calibration(seed)

    def search(self, seed: int, settings: PTQSettings) -> tuple[object, ...]:
        """A whole search, as a user would run it; its row less the keys."""
        clock, started = CpuClock(), time.process_time()
        settings = replace(settings, discrete_every=0)
        inputs, space = self.inputs(seed), eight(self.bits)
        result = search_ptq(self.model, inputs, space, settings, seed=seed, trainer=CPU, reporter=clock)
        spent = time.process_time() - started
        outcome = result.discretized
        found = self.held_out.measure(result.supernet, outcome.assignments[outcome.exported])
        argmax = outcome.assignments["argmax"]
        frozen = int(result.history[-1].get("frozen", 0))
        options = "".join(str(argmax[name]) for name in sorted(argmax))
        selection = outcome.selection["argmax"]
        cost = result.metrics["steps"], frozen, result.metrics["evaluations"]
        return found.kl, found.top1, selection, *cost, clock.seconds["search"], spent, options


def searches(arguments: argparse.Namespace) -> None:
    """Whole searches: the variants of a seed one after the other, each seed beginning with another."""
    table = Table(arguments.out, SEARCHES, keys=3)
    for name in arguments.tasks:
        task = Task(name, arguments.data)
        warm = replace(VARIANTS["settle, stop"], steps=6, settle=Settling(0.5, 1))
        task.search(0, warm)  # compiles what there is to compile
        for seed in arguments.seeds:
            order = arguments.variants[seed % len(arguments.variants) :]
            for variant in (*order, *arguments.variants[: seed % len(arguments.variants)]):
                if not table.has(name, seed, variant):
                    table.add(name, seed, variant, *task.search(seed, VARIANTS[variant]))


def steps(arguments: argparse.Namespace) -> None:
    """Steps and their memory, every measurement in a process of its own."""
    table = Table(HERE / "steps.csv", TIMED, keys=3)
    for network in arguments.networks:
        for part, rows in (("step", STEPS), ("memory", MEMORY)):
            jobs = [Job(network, part, rows)] if part == "step" else [Job(network, part, (r,)) for r in rows]
            for job in jobs:
                if not all(table.has(network, part, row) for row in job.rows):
                    for found in _alone(job):
                        table.add(network, part, *found.values())


def _alone(job: Job) -> list[dict[str, object]]:
    extra = memory.ENVIRONMENT if job.part == "memory" else {}
    command = [sys.executable, "-m", "experiments.switches.steps", json.dumps(asdict(job))]
    environment = {**os.environ, **extra, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: list[dict[str, object]] = json.loads(ended.stdout.splitlines()[-1])
    return found


def summary(path: Path) -> None:
    """Means over the seeds; CPU seconds as ratios to the same seed with everything off."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    rows.sort(key=lambda row: (row["task"], list(VARIANTS).index(row["variant"])))
    off = {(row["task"], row["seed"]): row for row in rows if row["variant"] == OFF}
    rows = [row for row in rows if (row["task"], row["seed"]) in off]
    print("| task | variant | n | KL | top-1 % | KL, selection | steps | frozen | CPU: steps | CPU: all |")
    print("|---" * 10 + "|")
    for key in dict.fromkeys((row["task"], row["variant"]) for row in rows):
        group = [row for row in rows if (row["task"], row["variant"]) == key]
        ratios = {
            column: [float(row[column]) / float(off[row["task"], row["seed"]][column]) for row in group]
            for column in ("search_cpu", "all_cpu")
        }
        cells = [_spread([float(row[c]) for row in group], 4) for c in ("kl", "top1", "selection_kl")]
        cells += [f"{mean(float(row[c]) for row in group):.0f}" for c in ("steps", "frozen")]
        cells += [_spread(found, 2) for found in ratios.values()]
        print("|", " | ".join([*key, str(len(group)), *cells]), "|")


def summary_of_steps(path: Path) -> None:
    """Time of a step, and its peak memory, as ratios to the plain step's."""
    with path.open() as file:
        found = {(row["network"], row["part"], row["row"]): row for row in csv.DictReader(file)}
    networks = list(dict.fromkeys(network for network, _, _ in found))
    print("\n| step |", " | ".join(NETWORKS[network].title for network in networks), "|")
    print("|---" * (1 + len(networks)) + "|")
    for part, rows in (("step", STEPS[1:]), ("memory", MEMORY)):
        for row in rows:
            cells = [_of_step(found, network, part, row) for network in networks]
            print("|", " | ".join([f"{part}: {row}", *cells]), "|")


def _of_step(found: dict[tuple[str, str, str], dict[str, str]], network: str, part: str, row: str) -> str:
    """A ratio, or the mebibytes that ratios are to; nothing where it is not measured yet."""
    this, plain = (found.get((network, part, name)) for name in (row, PLAIN))
    if this is None or plain is None:
        return ""
    if part == "step":
        return "{ratio:.2f} ({low:.2f} .. {high:.2f})".format(
            **{key: float(this[key]) for key in ("ratio", "low", "high")}
        )
    value = float(this["value"])
    return f"{value:.0f} MiB" if row == PLAIN else f"{value / float(plain['value']):.2f}"


def _spread(values: list[float], digits: int) -> str:
    least, most = (f"{found:.{digits}g}" for found in (min(values), max(values)))
    return f"{mean(values):.{digits}g}" + (f" ({least} .. {most})" if least != most else "")


def main() -> None:
    """Compute the rows that are missing, or sum up those that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="*", default=["digits", "cifar"], choices=["digits", "cifar"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=HERE / "searches.csv")
    parser.add_argument("--summary", action="store_true", help="sum up the rows that are there")
    arguments = parser.parse_args()
    if arguments.summary:
        summary(arguments.out)
        return summary_of_steps(HERE / "steps.csv")
    if arguments.data is None and "cifar" in arguments.tasks:
        parser.error("--data FOLDER is needed")
    quiet(1)
    searches(arguments)
    steps(arguments)


if __name__ == "__main__":
    main()

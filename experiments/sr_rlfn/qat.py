"""The same question with training: is a searched strategy better than one algorithm at equal steps?

    python -m experiments.sr_rlfn.qat --work FOLDER

The network is the small RLFN in the package, the pictures are those of data=photographs: nothing to
download. FOLDER takes run folders, from which an interrupted study goes on. Rows are appended to qat.csv.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from dqss.data.photographs import Photographs
from dqss.lit.contenders import Validation
from dqss.lit.qat_search import search_qat
from dqss.lit.qat_settings import QATSettings
from dqss.lit.schedules import SoftmaxSchedule
from dqss.lit.search import SearchResult, search_ptq
from dqss.lit.settings import PTQSettings
from dqss.models.super_resolution import photographs_rlfn
from dqss.search_spaces import learned, uniform
from dqss.search_spaces.studies import EIGHT_WEIGHTS, PICTURES_ACTIVATIONS
from dqss.space import Rule
from dqss.strategy import Strategy
from experiments.harness import CPU, Table, quiet, study_parser, summarize
from experiments.sr_rlfn.run import EDGES, Moving
from experiments.widths import EDGE_BITS

HERE = Path(__file__).parent
COLUMNS = ("bits", "steps", "seed", "row", "psnr", "seconds", "choices")
PATCH, BATCH = 24, 8
WEIGHTS, INPUTS = ("lsq", "lsq_plus", "dorefa", "minmax"), ("lsq", "lsq_plus", "pams", "minmax")
UNIFORM = {
    "uniform_lsq": ("lsq", "lsq"),
    "uniform_lsq_plus": ("lsq_plus", "lsq_plus"),
    "uniform_pams": ("lsq", "pams"),
    "uniform_dorefa_lsq_plus": ("dorefa", "lsq_plus"),
    "uniform_minmax": ("minmax", "minmax"),
}
"""Algorithms of weights and of inputs; PAMS says nothing about weights that LSQ does not."""
SEARCHED, PTQ, WIDTHS, PTQ_WIDTHS = "searched", "ptq", "searched_widths", "ptq_widths"
RATE = 3e-4
PLAIN = PTQSettings(steps=300, batch_size=4, screen_images=4, discrete_every=0)
COMMON = QATSettings(
    batch_size=BATCH,
    learning_rate=RATE,
    logit_rate=0.1,
    schedule=SoftmaxSchedule(entropy=0.5, entropy_delay=0.3),
    norm_batches=0,
)
SHARES = {SEARCHED: 0.4, "searched_sharp": 0.2, WIDTHS: 0.2}
"""Of the steps for the search; the rest tunes what it has found."""
# From the first step on, steps of the logits five times as large; rates fall once over search and tuning.
SHARP = replace(
    COMMON,
    warmup=0.0,
    restart=False,
    logit_rate=0.5,
    schedule=SoftmaxSchedule(entropy=0.5, entropy_delay=0.0),
)
SETTINGS = {"searched_sharp": SHARP, WIDTHS: SHARP}
"""Of rows that are not searched, or tuned, as the others."""
ROWS = (PTQ, PTQ_WIDTHS, *UNIFORM, *SHARES)


@dataclass(frozen=True)
class Study:
    """The network, its pictures, and where runs are kept."""

    work: Path

    def data(self, seed: int) -> Photographs:
        """Patches that depend on the seed; the pictures to measure on do not."""
        found = Photographs(32, PATCH, seed)
        found.configure(photographs_rlfn().input)
        return found

    def row(self, name: str, bits: int, steps: int, seed: int) -> Iterator[Any]:
        """PSNR on the three other photographs in dB, seconds, and what was chosen how often."""
        data, model = self.data(seed), photographs_rlfn().module
        metric_name, metric = data.metric()
        validation = Validation(data.val_dataloader() or (), metric, metric_name)
        common: dict[str, Any] = {
            "validation": validation,
            "run_dir": self.work / f"{name}_{bits}_{steps}_{seed}",
            "seed": seed,
            "trainer": CPU,
        }
        started = time.perf_counter()
        result: Any
        if name == PTQ:
            space = uniform(bits, bits, EIGHT_WEIGHTS, PICTURES_ACTIVATIONS, edges=EDGES)
            result = search_ptq(model, data.calibration(), space, PLAIN, **common, report_images=0)
        elif name == PTQ_WIDTHS:
            result = self.moved(bits, common)
        else:
            weights, inputs = (WEIGHTS, INPUTS) if name in SHARES else ([one] for one in UNIFORM[name])
            space = learned(bits, bits, weights, inputs, edges=EDGES)
            if name == WIDTHS:
                searched = self.moved(bits, {**common, "run_dir": self.work / f"{WIDTHS}_ptq_{bits}_{seed}"})
                space = replace(space, rules=(space.rules[0], *each_at_its_bits(searched.bundle.strategy)))
            loader = data.train_dataloader()
            epochs = steps / (len(loader.dataset) // BATCH)  # type: ignore[arg-type]
            result = search_qat(model, loader, data.calibration(), space, settings_of(name, epochs), **common)
        psnr = result.metrics["searched"]["validation"][metric_name]
        yield from (psnr, time.perf_counter() - started, choices(result.bundle.strategy))

    def moved(self, bits: int, common: Mapping[str, Any]) -> SearchResult:
        """A search without training that moves bits, as many in the mean."""
        data, model, moving = self.data(common["seed"]).calibration(), photographs_rlfn().module, Moving()
        budget = moving.budget(model, data.batch([0]), bits, EDGE_BITS)
        return search_ptq(model, data, moving.space(bits, EDGE_BITS), PLAIN, **common, budget=budget)


def each_at_its_bits(strategy: Strategy) -> Iterator[Rule]:
    """For each layer of a strategy the algorithms that learn."""
    for layer, pair in strategy.layers.items():
        assert pair.weight is not None and pair.activation is not None
        bits = [choice.candidate().spec.bits for choice in (pair.weight, pair.activation)]
        yield replace(learned(*bits, WEIGHTS, INPUTS).rules[-1], names=(layer,))


def settings_of(name: str, epochs: float) -> QATSettings:
    """A share of the epochs searches, the rest tunes; where nothing is searched, all of it is one."""
    share = SHARES.get(name, 1.0)
    settings = SETTINGS.get(name, COMMON)
    return replace(settings, epochs=share * epochs, tune_epochs=(1 - share) * epochs)


def choices(strategy: Any) -> str:
    """How often each algorithm was chosen, weights before inputs."""
    names = [f"{role[0]}:{choice.algorithm}" for _, role, choice in strategy.choices()]
    return " ".join(f"{name}={names.count(name)}" for name in sorted(set(names), reverse=True))


def main() -> None:
    """Compute, or sum up."""
    parser = study_parser(__doc__, HERE / "qat.csv")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    arguments = parser.parse_args()
    if arguments.summary:
        return summarize(arguments.out, ("bits", "steps", "row"), ("psnr", "seconds"))
    if arguments.work is None:
        parser.error("--work FOLDER is needed")
    quiet(arguments.threads)
    table = Table(arguments.out, COLUMNS, keys=4)
    study = Study(arguments.work)
    for seed, bits, row in product(arguments.seeds, arguments.bits, arguments.rows):
        if not table.has(bits, arguments.steps, seed, row):
            table.add(bits, arguments.steps, seed, row, *study.row(row, bits, arguments.steps, seed))


if __name__ == "__main__":
    main()

"""Study: does searching the algorithm of each layer while training beat one algorithm for all? See README.md.

    python -m experiments.cifar_qat.run --data FOLDER --work FOLDER

The first FOLDER holds ``train_jpeg.npz``, ``test_jpeg.npz`` and ``resnet20-12fca82f.th``; the second
takes float weights and run folders, from which an interrupted study goes on. Rows are appended to
results.csv as they are found; rows that are there already are not computed again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from dqss.layers import searchable_layers
from dqss.lit.contenders import Validation
from dqss.lit.qat_search import search_qat
from dqss.lit.qat_settings import QATSettings, Start
from dqss.lit.schedules import GumbelSchedule, MeanFieldSchedule, SoftmaxSchedule
from dqss.lit.updates import Bilevel
from dqss.search_spaces import learned
from dqss.space import SearchSpace
from experiments.cifar_qat.network import Cifar, float_network
from experiments.harness import CPU, Table, quiet, study_parser, summarize

HERE = Path(__file__).parent
COLUMNS = ("bits", "epochs", "seed", "row", "top1", "argmax_top1", "kl", "seconds", "choices")
EDGES = ("conv1", "linear")
"""The first and the last layer, at eight bits in every row."""
WEIGHTS, ACTIVATIONS = ("lsq", "lsq_plus", "dorefa", "dsq"), ("lsq", "lsq_plus", "pact", "dorefa")
UNIFORM = {
    "lsq": ("lsq", "lsq"),
    "lsq_plus": ("lsq_plus", "lsq_plus"),
    "pact": ("dorefa", "pact"),
    "dorefa": ("dorefa", "dorefa"),
}
"""Algorithms of weights and activations; PACT's paper has DoReFa's weights."""

Spaces = Callable[[int, int, nn.Module], SearchSpace]


@dataclass(frozen=True)
class Row:
    """One way to a quantized network, in ``epochs`` passes over the training images.

    Attributes:
        space: of bits, seed and network.
        share: of the epochs for the search; the rest tunes.
        changes: of the settings.
    """

    space: Spaces
    share: float = 1.0
    changes: dict[str, Any] = field(default_factory=dict)

    def settings(self, epochs: float) -> QATSettings:
        """At so many epochs in all."""
        plain = QATSettings(epochs=self.share * epochs, tune_epochs=(1 - self.share) * epochs)
        return replace(plain, **self.changes)


def uniform(weight: str, activation: str) -> Spaces:
    """One algorithm for all layers."""
    return lambda bits, seed, model: learned(bits, bits, [weight], [activation], edges=EDGES)


def everything(bits: int, seed: int, model: nn.Module) -> SearchSpace:
    """Four candidates a side."""
    return learned(bits, bits, WEIGHTS, ACTIVATIONS, edges=EDGES)


def drawn(bits: int, seed: int, model: nn.Module) -> SearchSpace:
    """One candidate a side, drawn for each layer."""
    generator, rules = random.Random(seed), []
    for name in searchable_layers(model):
        if name not in EDGES:
            one = learned(bits, bits, [generator.choice(WEIGHTS)], [generator.choice(ACTIVATIONS)])
            rules.append(replace(one.rules[-1], names=(name,)))
    return SearchSpace("drawn", (*rules, *learned(bits, bits, edges=EDGES).rules[:1]))


RAMP = SoftmaxSchedule(entropy=0.5, entropy_delay=0.3)
"""A softmax that is pressed towards certainty."""
COOLED = SoftmaxSchedule(final_temperature=0.1)
MEAN_FIELD = MeanFieldSchedule(reheats=0)
QUARTER = 0.25
"""Of the epochs for the search."""


def searched(share: float = QUARTER, **changes: Any) -> Row:
    """A search among all candidates, by the softmax unless something else is said."""
    return Row(everything, share, {"schedule": RAMP, **changes})


def begun(share: float = 0.4, **changes: Any) -> Row:
    """One of the settings that the study began with."""
    return searched(share, **{"logit_rate": 0.02, **changes})


ROWS: dict[str, Row] = {
    **{f"uniform_{name}": Row(uniform(*pair)) for name, pair in UNIFORM.items()},
    "random": Row(drawn),
    "dqss": searched(),
    "bilevel": searched(update=Bilevel()),
    # One thing changed each.
    "no_warmup": searched(warmup=0.0),
    "no_compensation": searched(compensate=False),
    "from_float": searched(start=Start.FLOAT),
    "gumbel": searched(schedule=GumbelSchedule(1.0, 0.5)),
    "mean_field": searched(schedule=MEAN_FIELD),
    # How long to search, and how the rates fall.
    "share_40": searched(0.4),
    "one_curve_40": searched(0.4, restart=False),
    "one_curve_75": searched(0.75, restart=False),
    "one_curve_75_cooled": searched(0.75, restart=False, schedule=COOLED),
    # Another pair for all layers, to see what is to be found.
    "pair_dorefa_lsq_plus": Row(uniform("dorefa", "lsq_plus")),
    # The first round: logits five times slower.
    "slow_softmax": begun(),
    "slow_gumbel": begun(schedule=GumbelSchedule(1.0, 0.5)),
    "slow_mean_field": begun(schedule=MEAN_FIELD),
    "slow_bilevel": begun(schedule=SoftmaxSchedule(), update=Bilevel()),
    "slow_from_float": begun(schedule=MEAN_FIELD, start=Start.FLOAT),
    "slow_search_only": begun(1.0, schedule=MEAN_FIELD),
}


def compute(row: str, bits: int, epochs: float, seed: int, data: Cifar, work: Path) -> tuple[Any, ...]:
    """What a row of the table says of one run."""
    model, found = float_network(data, work), ROWS[row]
    started = time.perf_counter()
    result = search_qat(
        model,
        data.training(),
        data.calibration(seed),
        found.space(bits, seed, model),
        found.settings(epochs),
        validation=Validation(data.testing(), lambda: MulticlassAccuracy(10, average="micro"), "top1"),
        run_dir=work / f"{row}_{bits}_{epochs:g}_{seed}",
        seed=seed,
        trainer=CPU,
    )
    seconds = time.perf_counter() - started
    top1, argmax = (100 * result.metrics[name]["validation"]["top1"] for name in ("searched", "argmax"))
    kl = result.metrics["searched"]["validation"]["distance"]
    return top1, argmax, kl, seconds, _choices(result.bundle.strategy)


def _choices(strategy: Any) -> str:
    """How often each algorithm was chosen: ``weight lsq 12 dorefa 6; activation ...``."""
    words = []
    for role in ("weight", "activation"):
        names = [choice.algorithm for _, own, choice in strategy.choices() if own == role]
        counts = sorted(((names.count(name), name) for name in set(names)), reverse=True)
        words.append(f"{role} " + " ".join(f"{name} {count}" for count, name in counts))
    return "; ".join(words)


def main() -> None:
    """Compute the rows that are missing."""
    parser = study_parser(__doc__, HERE / "results.csv")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[2])
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    arguments = parser.parse_args()
    if arguments.summary:
        return summarize(arguments.out, ("bits", "epochs", "row"), ("top1", "argmax_top1", "kl", "seconds"))
    if arguments.data is None or arguments.work is None:
        parser.error("--data FOLDER and --work FOLDER are needed")
    quiet(arguments.threads)
    table = Table(arguments.out, COLUMNS, keys=4)
    data = Cifar(arguments.data)
    for seed in arguments.seeds:
        for bits in arguments.bits:
            for row in arguments.rows:
                key = bits, f"{arguments.epochs:g}", seed, row
                if not table.has(*key):
                    table.add(*key, *compute(row, bits, arguments.epochs, seed, data, arguments.work))


if __name__ == "__main__":
    main()

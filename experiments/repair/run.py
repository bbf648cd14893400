"""Study: what do learned rounding and corrected biases add to a searched strategy? See README.md here.

    python -m experiments.repair.run --data FOLDER --work FOLDER
    python -m experiments.repair.run --data FOLDER --work FOLDER --mobilenet FILE

The data are those of ``experiments/cifar_resnet20`` and ``experiments/imagenet_mobile``. Searched
strategies are kept in the folder of ``--work``, rows are appended to results.csv as they are found;
what is there is not computed again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dqss.apply import apply_strategy, make_bundle
from dqss.bundle import Bundle, load
from dqss.lit.again import search_activations
from dqss.lit.build import build
from dqss.lit.device import device_of
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.measure import Evaluator
from dqss.prepare import Prepared
from dqss.progress import Reporter
from dqss.repair import RepairSettings, repair_strategy
from dqss.repair.augment import TRANSFORMATIONS
from dqss.samples import Samples, split
from dqss.strategy import ModelInfo, utc_now
from dqss.supernet import Assignment
from dqss.uniform import screen, uniform_assignments
from experiments.cifar_resnet20.run import Study
from experiments.harness import HeldOut, Table, add_accelerator, preset, quiet, study_parser, summarize
from experiments.imagenet_mobile.run import Network
from experiments.repair.starts import STARTS, Source, Start, Weights, space
from experiments.widths import same_mean

HERE = Path(__file__).parent
BITS = {"W4A4": (4, 4), "W4A8": (4, 8), "W3A8": (3, 8), "W6A6": (6, 6)}
MOBILE_EDGES = ("conv_stem", "classifier")
EDGES = {"resnet20": ("conv1", "linear"), "mobilenet": MOBILE_EDGES, "efficientnet": MOBILE_EDGES}
CHECKPOINTS = {"mobilenet": "mobilenet_v2-b0353104.pth", "efficientnet": "efficientnet-lite0-57934424.pth"}
COLUMNS = (
    "network", "bits", "edges", "seed", "row", "kl", "top1", "gain", "gain_low", "gain_high", "dev_kl",
    "search_seconds", "seconds",
)  # fmt: skip

ITERATIONS = 500
ADAROUND = RepairSettings(blocks=(), drop=0.0, float_inputs=0.0, iterations=ITERATIONS)
BLOCKS = RepairSettings(iterations=ITERATIONS)
LEARNED = ("iterations", "batch_size", "learning_rate", "regularization", "augment", "augment_copies")
"""Settings of how blocks and layers learn that options change."""
REPAIRS = {
    "adaround": ADAROUND,
    "adaround+steps": replace(ADAROUND, learn_steps=True),
    "adaround+grids": replace(ADAROUND, learn_weight_steps=True, learn_biases=True),
    "adaround+grids+clipped": replace(
        ADAROUND, learn_weight_steps=True, learn_biases=True, clipped_targets=True
    ),
    "adaround+clipped": replace(ADAROUND, clipped_targets=True),
    "adaround+grids+steps": replace(ADAROUND, learn_weight_steps=True, learn_biases=True, learn_steps=True),
    "adaround+biases": replace(ADAROUND, bias_correction=True),
    "blocks": BLOCKS,
    "blocks+steps": replace(BLOCKS, learn_steps=True),
    "blocks+steps+biases": replace(BLOCKS, learn_steps=True, bias_correction=True),
    "biases": RepairSettings(iterations=0, bias_correction=True),
}


AGAIN = "+again"
"""Ends the names of rows whose activations are searched again, around what repair made of the weights."""
ROWS: dict[str, tuple[str, RepairSettings | None]] = {name: (name, None) for name in STARTS}
ROWS |= {f"{name}+{how}": (name, settings) for name in STARTS for how, settings in REPAIRS.items()}
NETWORK = "+network"
"""Ends the names of rows that learn once more, all layers at once, from where that row ended."""
TOGETHER = RepairSettings(iterations=0, network_iterations=150, batch_size=32)
ROWS |= {f"{row}{NETWORK}": found for row, found in ROWS.items() if found[1] is None or found[1].iterations}
ROWS |= {f"{row}{AGAIN}": found for row, found in ROWS.items() if found[1] and not found[1].learn_steps}
"""What is tuned, and how."""
USUAL = (
    "best_uniform", "searched", "mse+adaround", "mse+adaround+again", "mse+blocks", "searched+adaround",
    "searched+adaround+again", "searched+blocks+steps",
    "fitted", "fitted+adaround", "fitted+adaround+steps", "activations", "activations+adaround",
    "activations+adaround+steps", "around_wide", "around_wide+adaround",
    "equalized_best_uniform", "equalized_mse+adaround", "equalized_fitted",
    "equalized_fitted+adaround", "equalized_fitted+adaround+steps",
)  # fmt: skip


@dataclass
class Subject:
    """A network, its calibration images by seed, images that report, others that may choose defaults."""

    name: str
    model: nn.Module
    calibration: Callable[[int], Samples]
    held_out: HeldOut
    dev: HeldOut | None
    settings: PTQSettings
    trainer: Mapping[str, Any]

    @classmethod
    def resnet20(cls, data: Path, settings: PTQSettings, trainer: Mapping[str, Any]) -> Subject:
        """CIFAR, as in ``experiments/cifar_resnet20``."""
        study = Study(data, settings)
        return cls("resnet20", study.model, study.calibration, study.held_out, study.dev, settings, trainer)

    @classmethod
    def imagenet(
        cls, name: str, data: Path, checkpoint: Path, settings: PTQSettings, trainer: Mapping[str, Any]
    ) -> Subject:
        """A network of ``experiments/imagenet_mobile``, and its images."""
        found = Network(name, checkpoint, data, device_of(trainer))
        return cls(name, found.model, lambda seed: found.samples, found.held_out, None, settings, trainer)

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return device_of(self.trainer)


class Setting:
    """One network at one width with one seed: its strategies, by name, made when they are asked for."""

    def __init__(
        self, study: Subject, bits: str, edges: str, seed: int, work: Path, everything: bool = False
    ) -> None:
        self.study, self.seed, self.everything = study, seed, everything
        self.bits, self.edges = BITS[bits], EDGES[study.name] if edges == "8" else ()
        network = "" if study.name == "resnet20" else f"{study.name}-"
        self.folder = work / f"{network}{bits}-{edges}-{seed}"
        self.samples = study.calibration(seed)
        self._built: dict[Start, tuple[Prepared, Evaluator]] = {}

    def strategy(self, name: str) -> tuple[Bundle, float]:
        """One of :data:`STARTS`, and the seconds that its search took (0: there was none)."""
        start, folder = STARTS[name], self.folder / name
        if not (folder / "strategy.json").exists():
            if start.weights is Weights.WIDE:
                self._search(start, folder / "search")
                self._bundle(start, load(folder / "search")).save(folder)
            elif start.source is Source.SEARCH:
                self._search(start, folder)
            else:
                self._bundle(start).save(folder)
        measured = folder / ("search" if start.weights is Weights.WIDE else "") / "metrics.json"
        seconds = json.loads(measured.read_text())["seconds"] if measured.exists() else {}
        return load(folder), float(sum(seconds.values()))

    def _search(self, start: Start, folder: Path) -> None:
        settings = replace(self.study.settings, equalize=start.equalized)
        options = {"seed": self.seed, "trainer": self.study.trainer, "run_dir": folder, "report_images": 0}
        if start.weights in (Weights.WIDTHS, Weights.EVERYTHING):
            options["budget"] = same_mean(self.study.model, self.samples.batch([0]), self.bits, self.edges)
        candidates = space(self.bits, self.edges, start.weights, start.affine)
        search_ptq(self.study.model, self.samples, candidates, settings, **options)  # type: ignore[arg-type]

    def _build(self, start: Start) -> tuple[Prepared, Evaluator]:
        """A calibrated supernet with eight candidates for weights, or nine."""
        weights = Weights.NINE if start.weights is Weights.NINE else Weights.EIGHT
        start = replace(start, source=Source.MSE, weights=weights)
        if start not in self._built:
            settings = replace(self.study.settings, equalize=start.equalized)
            arguments = (
                space(self.bits, self.edges, weights, start.affine),
                settings,
                self.seed,
                None,
                self.study.device,
                Reporter(),
            )
            self._built[start] = build(self.study.model, self.samples, *arguments)
        return self._built[start]

    def _bundle(self, start: Start, searched: Bundle | None = None) -> Bundle:
        """A uniform strategy, but for the activations of one that was ``searched``."""
        prepared, evaluator = self._build(start)
        model = ModelInfo(source="study", name=self.study.name, weights_sha256="", tensors={}, prepare=[])
        name = evaluator.supernet.space.name
        fields = {"dqss": "", "created": utc_now(), "search_space": name, "method": "uniform"}
        example = self.samples.batch([0])
        options = {"seed": self.seed, "budget": None}
        if searched is None:
            assignment = uniform(evaluator, start.source)
        else:
            assignment = {**uniform(evaluator, Source.MSE), **inputs_of(evaluator, searched)}
        return make_bundle(evaluator.supernet, assignment, prepared, model, example, **fields, **options)

    def repaired(self, row: str, settings: RepairSettings, suffix: str) -> Bundle:
        """A strategy that was tuned; kept in the work folder, block by block."""
        folder = self.folder / f"{row.removesuffix(AGAIN).removesuffix(NETWORK)}{suffix}"
        if not (folder / "strategy.json").exists():
            bundle, _ = self.strategy(ROWS[row][0])
            options = {"seed": self.seed, "device": self.study.device, "folder": folder}
            repair_strategy(self.study.model, bundle, self.inputs(), settings, **options).bundle.save(folder)
        return load(folder)

    def together(self, name: str, bundle: Bundle, settings: RepairSettings) -> Bundle:
        """What was made so far, all layers of it at once; kept in the work folder under ``name``."""
        folder = self.folder / name
        if not (folder / "strategy.json").exists():
            options = {"seed": self.seed, "device": self.study.device, "folder": folder}
            repair_strategy(self.study.model, bundle, self.inputs(), settings, **options).bundle.save(folder)
        return load(folder)

    def again(self, bundle: Bundle, start: Start) -> Bundle:
        """With activations that are searched again."""
        study = self.study
        settings = replace(study.settings, equalize=False)
        options = {"seed": self.seed, "folder": None, "device": study.device}
        given = (
            self.samples,
            space(self.bits, self.edges, affine=start.affine),
            settings,
            Reporter(),
            study.trainer,
        )
        return search_activations(study.model, bundle, *given, **options)

    def inputs(self) -> Samples:
        """What repair sees: the part that is searched on, or all of them."""
        return self.samples if self.everything else self.samples.subset(self.parts()[0])

    def unseen(self) -> HeldOut | None:
        """Other images, without labels: those of the study, or the part that repair does not see."""
        if self.study.dev is not None or self.everything:
            return self.study.dev
        rest = self.parts()[1]
        images = self.samples.batch(rest).to(self.study.device)
        return HeldOut(self.study.model.to(self.study.device), images, torch.zeros(len(rest)), 25)

    def parts(self) -> list[list[int]]:
        """Of the calibration images: those searched on, and those of the selection."""
        return split(len(self.samples), self.study.settings.parts, self.seed)


def uniform(evaluator: Evaluator, source: Source) -> Assignment:
    """The best of all uniform strategies, or the one of the algorithms that ``source`` names."""
    found = uniform_assignments(evaluator.supernet)
    if source is Source.BEST_UNIFORM:
        return found[screen(evaluator, found, 4).names[0]]
    weight, activation = source.pair
    return next(one for key, one in found.items() if f"W {weight}@" in key and f"A {activation}@" in key)


def inputs_of(evaluator: Evaluator, searched: Bundle) -> Assignment:
    """The options that a strategy with the same candidates for activations has chosen for these."""
    decisions = evaluator.supernet.decisions
    return {
        choice.decision: decisions[choice.decision].options.index(choice.candidate())
        for _, role, choice in searched.strategy.choices()
        if role == "activation"
    }


def rows(
    setting: Setting,
    named: Mapping[str, str],
    change: Mapping[str, Any],
    suffix: str,
    together: RepairSettings,
) -> Iterator[tuple[object, ...]]:
    """Every row that is wanted (and its full name): which it is, and what the columns after it say.

    Seconds are those of what was not in the work folder yet.
    """
    study = setting.study
    for row, full in named.items():
        name, settings = ROWS[row]
        bundle, searched = setting.strategy(name)
        started = time.perf_counter()
        if settings is not None:
            settings = replace(settings, **change) if settings.iterations else settings
            bundle = setting.repaired(row, settings, suffix if settings.iterations else "")
        if NETWORK in row:
            bundle = setting.together(full.replace(AGAIN, ""), bundle, together)
        if row.endswith(AGAIN):
            bundle = setting.again(bundle, STARTS[name])
        seconds = time.perf_counter() - started
        tuned = apply_strategy(study.model, bundle).to(study.device)
        found = study.held_out.measure_module(tuned)
        gain = found.gain_over(study.held_out.float())
        unseen = setting.unseen()
        dev = float("nan") if unseen is None else unseen.measure_module(tuned).kl
        yield row, found.kl, found.top1, *gain, dev, searched, seconds


def _rates(settings: RepairSettings) -> tuple[float, float]:
    return settings.network_learning_rate, settings.network_step_learning_rate


def _suffix(settings: RepairSettings, everything: bool) -> str:
    """What names of rows say of how blocks learn, where that is not as usual."""
    found, size = "", (settings.iterations, settings.batch_size)
    if size != (ITERATIONS, BLOCKS.batch_size):
        found += "_{}x{}".format(*size)
    if settings.learning_rate != BLOCKS.learning_rate:
        found += f"_lr{settings.learning_rate:g}"
    if settings.regularization != BLOCKS.regularization:
        found += f"_reg{settings.regularization:g}"
    if settings.augment:
        found += f"_{'-'.join(map(str, settings.augment))}x{settings.augment_copies}"
    return found + ("_all" if everything else "")


def _ending(settings: RepairSettings) -> str:
    """Likewise of how the network learns."""
    found, size = "", (settings.network_iterations, settings.batch_size)
    if size != (TOGETHER.network_iterations, TOGETHER.batch_size) or _rates(settings) != _rates(TOGETHER):
        found += "_n{}x{}".format(*size)
    if _rates(settings) != _rates(TOGETHER):
        found += "_{:g}_{:g}".format(*_rates(settings))
    return found + "".join(f"_{step}" for step in settings.augment)


def _iterates(row: str) -> bool:
    settings = ROWS[row][1]
    return settings is not None and settings.iterations > 0


def main() -> None:
    """Compute the rows that are missing."""
    parser = study_parser(__doc__, HERE / "results.csv")
    add_accelerator(parser)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, help="where strategies are kept")
    for name, file in CHECKPOINTS.items():
        parser.add_argument(f"--{name}", type=Path, help=f"{file}; instead of ResNet-20")
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--batch-size", type=int, default=BLOCKS.batch_size)
    parser.add_argument("--learning-rate", type=float, default=BLOCKS.learning_rate)
    parser.add_argument("--regularization", type=float, default=BLOCKS.regularization)
    transformations = {"nargs": "+", "default": [], "choices": list(TRANSFORMATIONS)}
    parser.add_argument("--augment", **transformations, help="what blocks or layers learn from")
    parser.add_argument("--augment-copies", type=int, default=BLOCKS.augment_copies)
    parser.add_argument("--all-images", action="store_true", help="repair sees the selection part as well")
    parser.add_argument("--network-augment", **transformations, help="what the network learns from at once")
    parser.add_argument("--network-iterations", type=int, default=TOGETHER.network_iterations)
    parser.add_argument("--network-batch-size", type=int, default=TOGETHER.batch_size)
    parser.add_argument("--network-learning-rate", type=float, default=TOGETHER.network_learning_rate)
    parser.add_argument("--network-step-learning-rate", type=float, default=_rates(TOGETHER)[1])
    parser.add_argument("--bits", nargs="+", default=list(BITS)[:3], choices=list(BITS))
    parser.add_argument("--edges", nargs="+", default=["same", "8"], choices=["same", "8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    known = f"a strategy ({', '.join(STARTS)}), or one and a repair of it: + {', '.join(REPAIRS)}"
    parser.add_argument("--rows", nargs="+", default=USUAL, choices=list(ROWS), metavar="ROW", help=known)
    parser.add_argument("--method", default="ptq", choices=["ptq", "ptq_fast"], help="preset of the search")
    parser.add_argument("--steps", type=int, help="of the search; by default as many as its preset says")
    arguments = parser.parse_args()
    if arguments.summary:
        shown = ("kl", "top1", "gain", "gain_low", "gain_high", "dev_kl", "search_seconds", "seconds")
        return summarize(arguments.out, ("network", "bits", "edges", "row"), shown)
    if arguments.data is None or arguments.work is None:
        parser.error("--data FOLDER and --work FOLDER are needed")
    quiet(arguments.threads)
    table = Table(arguments.out, COLUMNS, keys=5)
    settings = replace(preset(arguments.method), discrete_every=0)
    if arguments.steps is not None:
        settings = replace(settings, steps=arguments.steps, batch_size=4)
    trainer = {"accelerator": arguments.accelerator}
    study: Subject | None = None
    for name in CHECKPOINTS:
        if getattr(arguments, name) is not None:
            study = Subject.imagenet(name, arguments.data, getattr(arguments, name), settings, trainer)
    study = study or Subject.resnet20(arguments.data, settings, trainer)
    method = arguments.method if arguments.steps is None else f"{arguments.method} {arguments.steps} steps"
    network = study.name if method == "ptq" else f"{study.name} ({method})"
    change = {name: getattr(arguments, name) for name in LEARNED}
    suffix = _suffix(replace(BLOCKS, **change), arguments.all_images)
    together = RepairSettings(
        iterations=0,
        network_iterations=arguments.network_iterations,
        batch_size=arguments.network_batch_size,
        network_learning_rate=arguments.network_learning_rate,
        network_step_learning_rate=arguments.network_step_learning_rate,
        augment=arguments.network_augment,
    )
    ending = _ending(together)
    for bits in arguments.bits:
        for edges in arguments.edges:
            for seed in arguments.seeds:
                key = (network, bits, edges, seed)
                folder = arguments.work / method.replace(" ", "-")
                setting = Setting(study, bits, edges, seed, folder, arguments.all_images)
                if not table.has(*key, "float"):
                    top1 = study.held_out.float().top1
                    table.add(*key, "float", 0.0, top1, *[0.0] * 6)
                named = {
                    row: row + (suffix if _iterates(row) else "") + (ending if NETWORK in row else "")
                    for row in arguments.rows
                }
                missing = {row: full for row, full in named.items() if not table.has(*key, full)}
                for row, *found in rows(setting, missing, change, suffix, together):
                    table.add(*key, named[row], *found)


if __name__ == "__main__":
    main()

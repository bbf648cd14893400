"""Study: what do learned rounding and corrected biases add to a searched strategy? See README.md here.

    python -m experiments.repair.run --data FOLDER --work FOLDER
    python -m experiments.repair.run --data FOLDER --work FOLDER --mobilenet FILE

The data are those of ``experiments/cifar_resnet20`` and ``experiments/imagenet_mobile``. Searched
strategies are kept in the folder of ``--work``, rows are appended to results.csv as they are found;
what is there is not computed again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dqss.apply import apply_strategy, make_bundle
from dqss.bundle import Bundle, load
from dqss.lit.build import build
from dqss.lit.device import device_of
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.measure import Evaluator
from dqss.prepare import Prepared
from dqss.progress import Reporter
from dqss.repair import RepairSettings, repair_strategy
from dqss.samples import Samples
from dqss.search_spaces.studies import eight
from dqss.space import SearchSpace
from dqss.strategy import ModelInfo, utc_now
from dqss.supernet import Assignment
from dqss.uniform import screen, uniform_assignments
from experiments.cifar_resnet20.run import Study
from experiments.harness import HeldOut, Table, add_accelerator, preset, quiet, study_parser, summarize
from experiments.imagenet_mobile.run import Network

HERE = Path(__file__).parent
BITS = {"W4A4": (4, 4), "W4A8": (4, 8), "W3A8": (3, 8)}
MOBILE_EDGES = ("conv_stem", "classifier")
EDGES = {"resnet20": ("conv1", "linear"), "mobilenet": MOBILE_EDGES, "efficientnet": MOBILE_EDGES}
CHECKPOINTS = {"mobilenet": "mobilenet_v2-b0353104.pth", "efficientnet": "efficientnet-lite0-57934424.pth"}
COLUMNS = ("network", "bits", "edges", "seed", "row", "kl", "top1", "dev_kl", "seconds")

ITERATIONS = 500
ADAROUND = RepairSettings(blocks=(), drop=0.0, float_inputs=0.0, iterations=ITERATIONS)
BLOCKS = RepairSettings(iterations=ITERATIONS)
STEPS = replace(BLOCKS, learn_steps=True)
BIASES = RepairSettings(iterations=0, bias_correction=True)
UNIFORM = {"minmax": "minmax", "mse": "mse"}
ROWS: dict[str, tuple[str, RepairSettings | None]] = {
    "best_uniform": ("best_uniform", None),
    "searched": ("searched", None),
    "searched+blocks": ("searched", BLOCKS),
    "searched+blocks+steps": ("searched", STEPS),
    "searched+blocks+steps+biases": ("searched", replace(STEPS, bias_correction=True)),
    "mse": ("mse", None),
    "mse+adaround": ("mse", ADAROUND),
    "mse+blocks": ("mse", BLOCKS),
    "mse+blocks+steps": ("mse", STEPS),
    "minmax": ("minmax", None),
    "minmax+adaround": ("minmax", ADAROUND),
    "searched+adaround": ("searched", ADAROUND),
    "searched+biases": ("searched", BIASES),
    "searched+adaround+biases": ("searched", replace(ADAROUND, bias_correction=True)),
}
"""What is tuned, and how."""


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
        found = Network(name, checkpoint, data)
        return cls(name, found.model, lambda seed: found.samples, found.held_out, None, settings, trainer)

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return device_of(self.trainer)


def space(bits: tuple[int, int], edges: tuple[str, ...]) -> SearchSpace:
    """Eight candidates a side; first and last layer like the others, or at 8 bits."""
    found = eight(*bits)
    if not edges:
        return found
    (rule,) = eight(8, 8).rules
    return replace(found, name=f"{found.name}, edges at 8", rules=(replace(rule, names=edges), *found.rules))


class Setting:
    """One network at one width with one seed: its strategies, by name, made when they are asked for."""

    def __init__(self, study: Subject, bits: str, edges: str, seed: int, work: Path) -> None:
        self.study, self.seed = study, seed
        self.space = space(BITS[bits], EDGES[study.name] if edges == "8" else ())
        network = "" if study.name == "resnet20" else f"{study.name}-"
        self.folder = work / f"{network}{bits}-{edges}-{seed}"
        self.samples = study.calibration(seed)
        self._built: tuple[Prepared, Evaluator] | None = None

    def strategy(self, name: str) -> Bundle:
        """The searched strategy, the best uniform one, or the uniform one of an algorithm."""
        folder = self.folder / name
        if not (folder / "strategy.json").exists():
            if name == "searched":
                self._search(folder)
            else:
                self._bundle(self._uniform(name)).save(folder)
        return load(folder)

    def _search(self, folder: Path) -> None:
        settings = self.study.settings
        options = {"seed": self.seed, "trainer": self.study.trainer, "run_dir": folder}
        search_ptq(self.study.model, self.samples, self.space, settings, **options)  # type: ignore[arg-type]

    def built(self) -> tuple[Prepared, Evaluator]:
        """A calibrated supernet."""
        if self._built is None:
            model, settings, device = self.study.model, self.study.settings, self.study.device
            arguments = (self.space, settings, self.seed, None, device, Reporter())
            self._built = build(model, self.samples, *arguments)
        return self._built

    def _uniform(self, name: str) -> Assignment:
        evaluator = self.built()[1]
        uniform = uniform_assignments(evaluator.supernet)
        if name == "best_uniform":
            return uniform[screen(evaluator, uniform, 4)[0]]
        return next(found for key, found in uniform.items() if key.count(f"{name}@") == 2)

    def _bundle(self, assignment: Assignment) -> Bundle:
        prepared, evaluator = self.built()
        model = ModelInfo(source="study", name=self.study.name, weights_sha256="", tensors={}, prepare=[])
        fields = {"dqss": "", "created": utc_now(), "search_space": self.space.name, "method": "uniform"}
        example = self.samples.batch([0])
        options = {"seed": self.seed, "budget": None}
        return make_bundle(evaluator.supernet, assignment, prepared, model, example, **fields, **options)

    def inputs(self) -> Samples:
        """What repair sees: the part that is searched on."""
        return self.samples.subset(self.built()[1].parts["search"])


def rows(
    setting: Setting, wanted: Sequence[str], change: Mapping[str, Any]
) -> Iterator[tuple[str, float, float, float, float]]:
    """Every row that is wanted: name, divergence, top-1, divergence on development images, seconds."""
    study, seed = setting.study, setting.seed
    for row in wanted:
        name, settings = ROWS[row]
        bundle, inputs, started = setting.strategy(name), setting.inputs(), time.perf_counter()
        if settings is not None:
            settings = replace(settings, **change) if settings.iterations else settings
            options = {"seed": seed, "device": study.device}
            bundle = repair_strategy(study.model, bundle, inputs, settings, **options).bundle
        seconds = time.perf_counter() - started
        network = apply_strategy(study.model, bundle).to(study.device)
        found = study.held_out.measure_module(network)
        dev = float("nan") if study.dev is None else study.dev.measure_module(network).kl
        yield row, found.kl, found.top1, dev, seconds


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
    parser.add_argument("--bits", nargs="+", default=list(BITS), choices=list(BITS))
    parser.add_argument("--edges", nargs="+", default=["same", "8"], choices=["same", "8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--method", default="ptq", choices=["ptq", "ptq_fast"], help="preset of the search")
    arguments = parser.parse_args()
    if arguments.summary:
        shown = ("kl", "top1", "dev_kl", "seconds")
        return summarize(arguments.out, ("network", "bits", "edges", "row"), shown)
    if arguments.data is None or arguments.work is None:
        parser.error("--data FOLDER and --work FOLDER are needed")
    quiet(arguments.threads)
    table = Table(arguments.out, COLUMNS, keys=5)
    settings: PTQSettings = replace(preset(arguments.method), discrete_every=0)
    trainer = {"accelerator": arguments.accelerator}
    study: Subject | None = None
    for name in CHECKPOINTS:
        if getattr(arguments, name) is not None:
            study = Subject.imagenet(name, arguments.data, getattr(arguments, name), settings, trainer)
    study = study or Subject.resnet20(arguments.data, settings, trainer)
    network = study.name if arguments.method == "ptq" else f"{study.name} ({arguments.method})"
    change = {"iterations": arguments.iterations, "batch_size": arguments.batch_size}
    usual = (arguments.iterations, arguments.batch_size) == (ITERATIONS, BLOCKS.batch_size)
    suffix = "" if usual else f"_{arguments.iterations}x{arguments.batch_size}"
    for bits in arguments.bits:
        for edges in arguments.edges:
            for seed in arguments.seeds:
                key = (network, bits, edges, seed)
                place = arguments.work / arguments.method
                setting = Setting(study, bits, edges, seed, place)
                if not table.has(*key, "float"):
                    table.add(*key, "float", 0.0, study.held_out.float().top1, 0.0, 0.0)
                named = {row: row + (suffix if _iterates(row) else "") for row in arguments.rows}
                missing = [row for row in arguments.rows if not table.has(*key, named[row])]
                for row, *found in rows(setting, missing, change):
                    table.add(*key, named[row], *found)


if __name__ == "__main__":
    main()

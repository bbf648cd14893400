"""Study: which way of choosing a strategy is best on a CIFAR ResNet-20? See README.md here.

    python -m experiments.cifar_resnet20.run --data FOLDER

FOLDER holds ``train_jpeg.npz``, ``test_jpeg.npz`` and ``resnet20-12fca82f.th``. Rows are appended
to results.csv as they are found; rows that are there already are not computed again.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dqss.discretize import RefineSettings
from dqss.lit.build import build
from dqss.lit.schedules import GumbelSchedule, MeanFieldSchedule, Schedule, SoftmaxSchedule
from dqss.lit.search import SearchResult, search_ptq
from dqss.lit.settings import BATCH_SIZE, PTQSettings
from dqss.measure import Evaluator, Meter
from dqss.models.factory import cifar_resnet
from dqss.progress import Reporter
from dqss.samples import Samples
from dqss.search_spaces.studies import eight
from dqss.supernet import Assignment, Supernet
from dqss.uniform import uniform_assignments
from experiments.harness import CPU, HeldOut, Table, drawn, greedy, layer_mse, quiet, study_parser, summarize

HERE = Path(__file__).parent
COLUMNS = ("bits", "seed", "row", "kl", "top1", "dev_kl", "evaluations", "seconds")
CALIBRATION, DEV = 512, 1000
"""Training images without labels; test images on which defaults were chosen: the rest report."""

BASELINES = ("float", "best_uniform", "oracle_uniform", "layer_mse", "random", "greedy")
SCHEDULES: dict[str, Schedule] = {
    "mean_field": MeanFieldSchedule(),
    "gumbel": GumbelSchedule(1.0, 0.5),
    "softmax": SoftmaxSchedule(),
    "softmax_cooled": SoftmaxSchedule(1.0, 0.1),
    "softmax_entropy": SoftmaxSchedule(entropy=1.0, entropy_delay=0.3),
}


def read(path: Path, indices: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, 32, 32]``, normalized as the network was trained, and labels."""
    with np.load(path) as archive:
        data, offsets, labels = archive["jpeg"].tobytes(), archive["offsets"], archive["labels"]
    chosen = np.arange(len(labels)) if indices is None else indices
    images = [np.asarray(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]]))) for i in chosen]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
    return (pixels - mean) / std, torch.from_numpy(labels[chosen]).long()


class Study:
    """The network, its data, and one calibrated supernet a (bits, seed)."""

    def __init__(self, data: Path, settings: PTQSettings) -> None:
        self.data, self.settings = data, settings
        # Of rows that were made with other settings than the usual.
        confidence, size = settings.refine.confidence, settings.batch_size
        self.suffix = "" if confidence == RefineSettings().confidence else f"_{confidence:g}se"
        self.suffix += "" if settings.steps is None else f"_{settings.steps}x{size or BATCH_SIZE}"
        self.model: nn.Module = cifar_resnet(checkpoint=str(data / "resnet20-12fca82f.th")).module
        images, labels = read(data / "test_jpeg.npz")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.held_out, self.dev = (
            HeldOut(self.model, images[part], labels[part], 250) for part in (order[DEV:], order[:DEV])
        )

    def calibration(self, seed: int, count: int = CALIBRATION) -> Samples:
        """Images of the train file, another choice for each seed; smaller counts begin alike."""
        with np.load(self.data / "train_jpeg.npz") as archive:
            available = len(archive["labels"])
        chosen = np.random.default_rng(seed).permutation(available)[:count]
        return Samples.of(read(self.data / "train_jpeg.npz", chosen)[0])

    def evaluator(self, bits: int, seed: int) -> Evaluator:
        """A calibrated supernet; its ``all`` part is all 512 images, for the baselines."""
        samples = self.calibration(seed)
        device = torch.device("cpu")
        _, evaluator = build(self.model, samples, eight(bits), self.settings, seed, None, device, Reporter())
        evaluator.parts = {**evaluator.parts, "all": range(len(samples))}
        evaluator.batch_size = 64
        evaluator.reference(range(len(samples)))
        evaluator.meter = Meter(len(samples))
        return evaluator

    def search(self, bits: int, seed: int, schedule: Schedule) -> SearchResult:
        """The whole search, as a user would run it."""
        settings = replace(self.settings, schedule=schedule)
        calibration = self.calibration(seed)
        return search_ptq(self.model, calibration, eight(bits), settings, seed=seed, trainer=CPU)

    def measure(self, supernet: Supernet, assignment: Assignment) -> tuple[float, float, float]:
        """Divergence and top-1 on what reports, and divergence on what chooses."""
        found = self.held_out.measure(supernet, assignment)
        return found.kl, found.top1, self.dev.measure(supernet, assignment).kl


Row = tuple[str, float, float, float, int, float]


def baselines(study: Study, bits: int, seed: int, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Uniform, per-layer MSE, random and greedy strategies, all with 512 calibration images."""
    if wanted("float"):
        yield "float", 0.0, study.held_out.float().top1, 0.0, 0, 0.0
    if not any(wanted(row) for row in BASELINES[1:]):
        return
    evaluator = study.evaluator(bits, seed)
    supernet, uniform = evaluator.supernet, uniform_assignments(evaluator.supernet)

    def row(name: str, assignment: Assignment, evaluations: int, seconds: float = 0.0) -> Row:
        return name, *study.measure(supernet, assignment), evaluations, seconds

    started = time.perf_counter()
    scores = {name: evaluator.measure(found, "all") for name, found in uniform.items()}
    best = dict(uniform[min(scores, key=lambda name: scores[name])])
    spent = evaluator.meter.evaluations
    if wanted("best_uniform"):
        yield row("best_uniform", best, spent, time.perf_counter() - started)
    if wanted("oracle_uniform"):
        oracle = study.held_out.best(supernet, uniform, first=250, finalists=8)
        yield row("oracle_uniform", uniform[oracle], 0)
    if wanted("layer_mse"):
        yield row("layer_mse", layer_mse(evaluator), len(evaluator.samples))
    if wanted("random"):
        draws = [study.measure(supernet, drawn(supernet, 1000 * seed + number)) for number in range(5)]
        kl, top1, dev = (sum(column) / len(draws) for column in zip(*draws, strict=True))
        yield "random", kl, top1, dev, 0, 0.0
    if wanted("greedy"):
        found = greedy(evaluator, best, "all")
        yield row("greedy", found, evaluator.meter.evaluations, time.perf_counter() - started)


def searched(study: Study, bits: int, seed: int, name: str) -> Iterator[Row]:
    """A relaxation: its argmax, what refinement makes of it, and what is exported."""
    started = time.perf_counter()
    result = study.search(bits, seed, SCHEDULES[name])
    seconds = time.perf_counter() - started
    evaluations = result.metrics["evaluations"]
    assignments = result.discretized.assignments
    rows = {"argmax": "argmax", "refined": "refined", "exported": result.discretized.exported}
    for row, chosen in rows.items():
        row += study.suffix
        yield f"{name}_{row}", *study.measure(result.supernet, assignments[chosen]), evaluations, seconds


def main() -> None:
    """Compute the rows that are missing."""
    parser = study_parser(__doc__, HERE / "results.csv")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--schedules", nargs="*", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--without", nargs="*", default=[], choices=BASELINES, help="baselines to leave out")
    parser.add_argument("--confidence", type=float, default=RefineSettings().confidence)
    parser.add_argument("--steps", type=int, help="of the search; by default as many as its bits need")
    parser.add_argument("--batch-size", type=int)
    arguments = parser.parse_args()
    if arguments.summary:
        return summarize(arguments.out, ("bits", "row"), ("kl", "top1", "dev_kl", "evaluations"))
    if arguments.data is None:
        parser.error("--data FOLDER is needed")
    quiet(arguments.threads)
    table = Table(arguments.out, COLUMNS, keys=3)
    refine = RefineSettings(confidence=arguments.confidence)
    settings = PTQSettings(
        steps=arguments.steps, batch_size=arguments.batch_size, discrete_every=0, refine=refine
    )
    study = Study(arguments.data, settings)
    for bits in arguments.bits:
        for seed in arguments.seeds:

            def missing(row: str, bits: int = bits, seed: int = seed) -> bool:
                return not table.has(bits, seed, row) and row not in arguments.without

            last = f"exported{study.suffix}"
            runs = [searched(study, bits, seed, n) for n in arguments.schedules if missing(f"{n}_{last}")]
            if any(missing(row) for row in BASELINES):
                runs.append(baselines(study, bits, seed, missing))
            for run in runs:
                for row in run:
                    if not table.has(bits, seed, row[0]):
                        table.add(bits, seed, *row)


if __name__ == "__main__":
    main()

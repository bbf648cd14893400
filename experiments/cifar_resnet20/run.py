"""Study: which way of choosing a strategy is best on a CIFAR ResNet-20? See README.md here.

    python experiments/cifar_resnet20/run.py --data FOLDER

FOLDER holds ``train_jpeg.npz``, ``test_jpeg.npz`` and ``resnet20-12fca82f.th``. Rows are appended
to results.csv as they are found; rows that are there already are not computed again.
"""

from __future__ import annotations

import argparse
import csv
import io
import logging
import random
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dqss.discretize import RefineSettings
from dqss.lit.schedules import GumbelSchedule, Schedule, SoftmaxSchedule
from dqss.lit.search import build, search_ptq
from dqss.lit.settings import PTQSettings
from dqss.measure import Evaluator, Meter, batches
from dqss.models.factory import cifar_resnet
from dqss.progress import Reporter
from dqss.samples import Samples
from dqss.search_spaces.studies import eight
from dqss.supernet import Assignment, Supernet
from dqss.uniform import uniform_assignments

HERE = Path(__file__).parent
COLUMNS = ("bits", "seed", "row", "kl", "top1", "evaluations", "seconds")
CALIBRATION, DEV = 512, 1000
"""Training images without labels; test images on which defaults were chosen (the rest reports)."""

BASELINES = ("float", "best_uniform", "oracle_uniform", "layer_mse", "random", "greedy")
SCHEDULES: dict[str, Schedule] = {
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

    def __init__(self, data: Path, part: str, settings: PTQSettings) -> None:
        self.data, self.settings = data, settings
        self.model: nn.Module = cifar_resnet(checkpoint=str(data / "resnet20-12fca82f.th")).module
        images, labels = read(data / "test_jpeg.npz")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        keep = order[:DEV] if part == "dev" else order[DEV:]
        self.images, self.labels = images[keep], labels[keep]
        with torch.no_grad():
            self.reference = torch.cat([self.model(run) for run in self.images.split(250)])

    def calibration(self, seed: int) -> Samples:
        """512 images of the train file, another choice for each seed."""
        with np.load(self.data / "train_jpeg.npz") as archive:
            count = len(archive["labels"])
        chosen = np.random.default_rng(seed).permutation(count)[:CALIBRATION]
        return Samples.of(read(self.data / "train_jpeg.npz", chosen)[0])

    @torch.no_grad()
    def test(
        self, supernet: Supernet, assignment: Assignment, count: int | None = None
    ) -> tuple[float, float]:
        """KL to the float network and top-1 in percent, on held-out images."""
        with supernet.assign(assignment):
            outputs = torch.cat([supernet(run) for run in self.images[:count].split(250)])
        wanted = torch.log_softmax(self.reference[:count], 1)
        kl = (wanted.exp() * (wanted - torch.log_softmax(outputs, 1))).sum(1).mean()
        return float(kl), 100 * float((outputs.argmax(1) == self.labels[:count]).float().mean())

    def evaluator(self, bits: int, seed: int) -> Evaluator:
        """A calibrated supernet; its ``all`` part is all 512 images, for the baselines."""
        samples = self.calibration(seed)
        device = torch.device("cpu")
        _, evaluator = build(self.model, samples, eight(bits), self.settings, seed, None, device, Reporter())
        evaluator.parts = {**evaluator.parts, "all": range(len(samples))}
        evaluator.batch_size = 128
        evaluator.reference(range(len(samples)))
        evaluator.meter = Meter(len(samples))
        return evaluator


Row = tuple[str, float, float, int, float]


def baselines(study: Study, bits: int, seed: int, wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Uniform, per-layer MSE, random and greedy strategies, all with 512 calibration images."""
    evaluator = study.evaluator(bits, seed)
    supernet, uniform = evaluator.supernet, uniform_assignments(evaluator.supernet)
    if wanted("float"):
        right = study.reference.argmax(1) == study.labels
        yield "float", 0.0, 100 * float(right.float().mean()), 0, 0.0
    if not any(wanted(row) for row in BASELINES[1:]):
        return
    started = time.perf_counter()
    scores = {name: evaluator.measure(found, "all") for name, found in uniform.items()}
    best = min(scores, key=lambda name: scores[name])
    spent = evaluator.meter.evaluations
    if wanted("best_uniform"):
        yield "best_uniform", *study.test(supernet, uniform[best]), spent, time.perf_counter() - started
    if wanted("oracle_uniform"):
        few = sorted(uniform, key=lambda name: study.test(supernet, uniform[name], 250)[0])[:8]
        yield "oracle_uniform", *min(study.test(supernet, uniform[name]) for name in few), 0, 0.0
    if wanted("layer_mse"):
        yield "layer_mse", *study.test(supernet, layer_mse(evaluator)), len(evaluator.samples), 0.0
    if wanted("random"):
        draws = [study.test(supernet, drawn(supernet, 1000 * seed + number)) for number in range(5)]
        yield "random", *(float(np.mean(column)) for column in zip(*draws, strict=True)), 0, 0.0
    if wanted("greedy"):
        found = greedy(evaluator, dict(uniform[best]))
        seconds = time.perf_counter() - started
        yield "greedy", *study.test(supernet, found), evaluator.meter.evaluations, seconds


def greedy(evaluator: Evaluator, current: dict[str, int]) -> dict[str, int]:
    """One sweep of coordinate descent over all decisions and options, on all calibration images."""
    best = evaluator.measure(current, "all")
    for name, decision in evaluator.supernet.decisions.items():
        for option in range(len(decision.options)):
            score = evaluator.measure({**current, name: option}, "all")
            if score < best:
                current, best = {**current, name: option}, score
    return current


@torch.no_grad()
def layer_mse(evaluator: Evaluator) -> dict[str, int]:
    """The option with the least mean squared error of its own tensor, for every decision."""
    supernet, errors = evaluator.supernet, {}
    for layer in supernet.layers.values():
        weight = layer.weight
        if weight is not None:
            original = layer.module.parametrizations.weight.original
            errors[weight.decision.name] = [
                float((weight.stack.choose(k) - original).square().sum())
                for k in range(len(weight.candidates))
            ]
    hooks = []
    for layer in supernet.layers.values():
        quantizer = layer.activation
        if quantizer is not None:
            total = errors.setdefault(quantizer.decision.name, [0.0] * len(quantizer.candidates))

            def add(module, args, quantizer=quantizer, total=total):  # type: ignore[no-untyped-def]
                for k in range(len(total)):
                    total[k] += float((quantizer[k](args[0]) - args[0]).square().sum())

            hooks.append(quantizer.register_forward_pre_hook(add))
    with supernet.mode("float"):
        for run in batches(range(128), 64):
            supernet(evaluator.samples.batch(run))
    for hook in hooks:
        hook.remove()
    return {name: int(np.argmin(values)) for name, values in errors.items()}


def drawn(supernet: Supernet, seed: int) -> dict[str, int]:
    """An option at random for every decision."""
    generator = random.Random(seed)
    return {name: generator.randrange(len(d.options)) for name, d in supernet.decisions.items()}


def searched(study: Study, bits: int, seed: int, name: str) -> Iterator[Row]:
    """A relaxation: its argmax, and what refinement makes of it."""
    settings = replace(study.settings, schedule=SCHEDULES[name])
    started = time.perf_counter()
    samples = study.calibration(seed)
    result = search_ptq(study.model, samples, eight(bits), settings, seed=seed)
    seconds = time.perf_counter() - started
    evaluations = result.metrics["evaluations"]
    for row in ("argmax", "refined"):
        found = result.discretized.assignments[row]
        yield f"{name}_{row}", *study.test(result.supernet, found), evaluations, seconds
    exported = result.discretized.assignments[result.discretized.exported]
    yield f"{name}_exported", *study.test(result.supernet, exported), evaluations, seconds


def main() -> None:
    """Compute the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--schedules", nargs="*", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--without", nargs="*", default=[], choices=BASELINES, help="baselines to leave out")
    parser.add_argument("--part", choices=("dev", "test"), default="test")
    parser.add_argument("--out", type=Path, default=HERE / "results.csv")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    known = read_rows(arguments.out)
    study = Study(arguments.data, arguments.part, PTQSettings(refine=RefineSettings(), discrete_every=0))
    for bits in arguments.bits:
        for seed in arguments.seeds:

            def missing(row: str, bits: int = bits, seed: int = seed) -> bool:
                return (bits, seed, row) not in known and row not in arguments.without

            runs = [searched(study, bits, seed, n) for n in arguments.schedules if missing(f"{n}_exported")]
            if any(missing(row) for row in BASELINES):
                runs.append(baselines(study, bits, seed, missing))
            for run in runs:
                for row in run:
                    append(arguments.out, (bits, seed, *row))


def read_rows(path: Path) -> set[tuple[int, int, str]]:
    """What results.csv holds already."""
    if not path.exists():
        return set()
    with path.open() as file:
        return {(int(row["bits"]), int(row["seed"]), row["row"]) for row in csv.DictReader(file)}


def append(path: Path, values: tuple[object, ...]) -> None:
    """Add a row, and the header to a new file."""
    fresh = not path.exists()
    with path.open("a") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        writer.writerow([f"{v:.4f}" if isinstance(v, float) else v for v in values])
    print(*[f"{v:.4f}" if isinstance(v, float) else v for v in values], flush=True)


if __name__ == "__main__":
    main()

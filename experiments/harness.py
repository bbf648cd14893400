"""What the studies share: resumable tables, held-out images, and strategies that are not searched."""

from __future__ import annotations

import argparse
import csv
import logging
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import Tensor, nn

from dqss.lit.settings import PTQSettings
from dqss.measure import Evaluator, batches, home
from dqss.precision import full_precision
from dqss.supernet import Assignment, Supernet


def quiet(threads: int) -> None:
    """A fixed number of threads, since results depend on it, and no chatter."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def study_parser(description: str | None, out: Path) -> argparse.ArgumentParser:
    """A command line with what all studies have: where rows go (``out``), threads, and the summary alone."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="sum up the rows that are there")
    return parser


def preset(name: str, *overrides: str) -> PTQSettings:
    """The settings of a preset of the method group, ``ptq_fast`` say, as the command line has them."""
    with initialize_config_module("dqss.conf", version_base=None):
        settings = instantiate(compose(f"method/{name}", list(overrides)).method, _convert_="all")
    assert isinstance(settings, PTQSettings)
    return settings


CPU = {"accelerator": "cpu"}
"""Trainer of every search in a study that has not :func:`add_accelerator`."""


def add_accelerator(parser: argparse.ArgumentParser) -> None:
    """``--accelerator``, for a study that runs on a GPU too: rows that are compared come from one device."""
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"])


class Table:
    """A csv file that grows row by row; rows that are there need not be computed again.

    Args:
        path: the file; made with its header by the first row.
        columns: of a row; the first ``keys`` of them identify it.
        keys: how many.
    """

    def __init__(self, path: Path, columns: Sequence[str], keys: int) -> None:
        self.path, self.columns, self.keys = path, tuple(columns), keys
        self.known: set[tuple[str, ...]] = set()
        if path.exists():
            with path.open() as file:
                rows = [tuple(row[c] for c in self.columns[:keys]) for row in csv.DictReader(file)]
            self.known = set(rows)

    def has(self, *key: object) -> bool:
        """Whether the row of this key is there."""
        return tuple(str(part) for part in key) in self.known

    def add(self, *values: object) -> None:
        """Append a row, and print it."""
        fresh = not self.path.exists()
        cells = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in values]
        with self.path.open("a") as file:
            writer = csv.writer(file, lineterminator="\n")
            if fresh:
                writer.writerow(self.columns)
            writer.writerow(cells)
        self.known.add(tuple(cells[: self.keys]))
        print(*cells, flush=True)


def summarize(path: Path, by: Sequence[str], values: Sequence[str]) -> None:
    """Print mean, least and most of each value as a markdown table, a line a group of rows."""
    groups: dict[tuple[str, ...], list[list[float]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            groups.setdefault(tuple(row[c] for c in by), []).append([float(row[c]) for c in values])
    print("|", " | ".join([*by, "n", *values]), "|")
    print("|---" * (len(by) + 1 + len(values)) + "|")
    for key, rows in groups.items():
        cells = [
            f"{sum(column) / len(column):.4g}"
            + (f" ({min(column):.4g} .. {max(column):.4g})" if len(set(column)) > 1 else "")
            for column in zip(*rows, strict=True)
        ]
        print("|", " | ".join([*key, str(len(rows)), *cells]), "|")


@dataclass(frozen=True)
class Quality:
    """A network on held-out images: each one's divergence from the float network, and which are right."""

    each: Tensor
    right: Tensor

    @property
    def kl(self) -> float:
        """Mean divergence in nats."""
        return float(self.each.mean())

    @property
    def top1(self) -> float:
        """In percent."""
        return 100 * float(self.right.float().mean())

    def gain_over(self, other: Quality) -> tuple[float, float, float]:
        """Difference of top-1 in points on the same images, and its 95 % interval.

        Normal approximation of the paired differences.
        """
        difference = 100 * (self.right.double() - other.right.double())
        mean = float(difference.mean())
        half = 1.96 * float(difference.std()) / len(difference) ** 0.5
        return mean, mean - half, mean + half


class HeldOut:
    """Labelled images that nothing is chosen with.

    Args:
        model: the float network.
        images, labels: ``[N, C, H, W]`` as the network takes them, and ``[N]``.
        batch_size: images at a time.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.reference = self._outputs(model, home(model), None)

    def float(self) -> Quality:
        """The float network itself."""
        return Quality(torch.zeros(len(self.labels)), self.reference.argmax(1) == self.labels)

    @torch.no_grad()
    def measure(self, supernet: Supernet, assignment: Assignment, count: int | None = None) -> Quality:
        """A discrete network on (the first ``count``) images."""
        with supernet.assign(assignment):
            return self.judge(self._outputs(supernet, home(supernet), count))

    def measure_module(self, model: nn.Module) -> Quality:
        """Any other network, as it stands and where it stands."""
        return self.judge(self._outputs(model, home(model), None))

    @full_precision()
    @torch.no_grad()
    def _outputs(self, run: Callable[[Tensor], Tensor], device: torch.device, count: int | None) -> Tensor:
        batches = self.images[:count].split(self.batch_size)
        return torch.cat([run(batch.to(device)).cpu() for batch in batches])

    def judge(self, outputs: Tensor) -> Quality:
        """Outputs for (the first of) the images."""
        count = len(outputs)
        wanted = torch.log_softmax(self.reference[:count], 1)
        each = (wanted.exp() * (wanted - torch.log_softmax(outputs, 1))).sum(1)
        return Quality(each, outputs.argmax(1) == self.labels[:count])

    def best(
        self, supernet: Supernet, assignments: Mapping[str, Assignment], first: int, finalists: int
    ) -> str:
        """Name of the assignment with the least divergence: all on ``first`` images, then the best."""
        few = {name: self.measure(supernet, found, first).kl for name, found in assignments.items()}
        kept = sorted(few, key=lambda name: few[name])[:finalists]
        return min(kept, key=lambda name: self.measure(supernet, assignments[name]).kl)


def greedy(evaluator: Evaluator, current: dict[str, int], part: str) -> dict[str, int]:
    """One sweep of coordinate descent over all decisions and options, on all images of a part."""
    best = evaluator.measure(current, part)
    for name, decision in evaluator.supernet.decisions.items():
        in_place = current[name]
        for option in (k for k in range(len(decision.options)) if k != in_place):
            score = evaluator.measure({**current, name: option}, part)
            if score < best:
                current, best = {**current, name: option}, score
    return current


@torch.no_grad()
def layer_mse(evaluator: Evaluator, images: int = 128) -> dict[str, int]:
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
        for run in batches(range(min(images, len(evaluator.samples))), 32):
            supernet(evaluator.samples.batch(run).to(evaluator.device))
    for hook in hooks:
        hook.remove()
    return {name: int(np.argmin(values)) for name, values in errors.items()}


def drawn(supernet: Supernet, seed: int) -> dict[str, int]:
    """An option at random for every decision."""
    generator = random.Random(seed)
    return {name: generator.randrange(len(d.options)) for name, d in supernet.decisions.items()}

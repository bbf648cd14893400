"""The steps that are compared: what each of them does from the batch to the moved parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss import fused
from dqss.lit.build import build
from dqss.lit.ptq import PTQSearch, StepBatches
from dqss.lit.schedules import MeanFieldSchedule, Schedule, SoftmaxSchedule
from dqss.lit.settings import PTQSettings
from dqss.measure import Evaluator
from dqss.progress import Reporter
from dqss.samples import Samples
from dqss.space import SearchSpace
from experiments.benchmarks.parallel import logits_of, parallelize


class Step(Protocol):
    """One step of something that learns."""

    optimizer: torch.optim.Optimizer

    def __call__(self) -> None:
        """Forward, backward, update."""


BATCH = 8
IMAGES = 20
"""Calibration inputs of steps that are timed alone: two batches to search on, and a part that is not used."""
SETTINGS = PTQSettings(batch_size=BATCH, discrete_every=0)
"""The defaults, without the discrete network that a search measures every fifty steps."""
STEPS_OF_A_SEARCH = SETTINGS.steps_at(8)


class FloatStep:
    """A training step of the float network: batch norms by the batch, SGD with momentum.

    Cross-entropy for classes, L1 for pictures.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        with torch.no_grad():
            output = model.eval()(images)
        self.model = model.train().requires_grad_()
        self.images = images
        self.targets = torch.arange(len(images), device=images.device) % output.shape[1]
        self.loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
        if output.ndim == 4:
            self.targets, self.loss = output + 1.0, F.l1_loss
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad()
        self.loss(self.model(self.images), self.targets).backward()
        self.optimizer.step()


class _Untrained(PTQSearch):
    """A search that no Trainer runs: the steps done are counted here."""

    done = 0

    @property
    def global_step(self) -> int:
        """What a Trainer would say."""
        return self.done


class SearchStep:
    """A step of the search as the product runs it, less Lightning's own overhead.

    Draws, batch, loss, history, backward and optimizer are those of :class:`dqss.lit.ptq.PTQSearch`;
    loaders, callbacks and checkpoints are left out.
    """

    def __init__(self, evaluator: Evaluator, schedule: Schedule, fuse: bool) -> None:
        batches = StepBatches(evaluator.parts["search"], evaluator.batch_size, STEPS_OF_A_SEARCH, seed=0)
        self.module = _Untrained(evaluator, batches, schedule, evaluator.distance, SETTINGS.learning_rate)
        self.module.discrete_every = 0
        self.module.to(evaluator.device)
        found = self.module.configure_optimizers()
        self.optimizer: torch.optim.Optimizer = found["optimizer"]
        self.scheduler: Any = found.get("lr_scheduler", {}).get("scheduler")
        self.fuse = fuse

    def __call__(self) -> None:
        """Everything that moves the logits once."""
        with fused.fused(self.fuse):
            self.optimizer.step(self._closure)
        if self.scheduler is not None:
            self.scheduler.step()
        self.module.done += 1

    def _closure(self) -> float:
        # In Lightning's order.
        loss = self.module.training_step(self.module.batches.at(self.module.done), self.module.done)
        self.optimizer.zero_grad()
        loss.backward()
        return loss.item()


class ParallelStep:
    """A step of DARTS' supernet of K parallel layers: the same batches and loss, Adam on the logits."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.batches = StepBatches(evaluator.parts["search"], evaluator.batch_size, STEPS_OF_A_SEARCH, seed=0)
        self.model = parallelize(evaluator.supernet)
        self.optimizer = torch.optim.Adam(logits_of(self.model), SETTINGS.learning_rate, (0.9, 0.99))
        self.done = 0

    def __call__(self) -> None:
        """Forward, backward, update."""
        indices = self.batches.at(self.done)
        self.done += 1
        images = self.evaluator.samples.batch(indices).to(self.evaluator.device)
        loss = self.evaluator.distance(self.model(images), self.evaluator.reference(indices))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


SEARCHES: dict[str, tuple[Schedule, bool]] = {
    "search": (MeanFieldSchedule(), True),
    "search, softmax": (SoftmaxSchedule(), True),
    "eager": (MeanFieldSchedule(), False),
    "eager, softmax": (SoftmaxSchedule(), False),
}
"""Steps of the product by their names in tables: schedule, and whether the mixtures are fused."""
FLOAT, PARALLEL = "float", "parallel"
STEPS = (FLOAT, *SEARCHES, PARALLEL)


def calibrated(model: nn.Module, images: Tensor, space: SearchSpace, device: torch.device) -> Evaluator:
    """What a search starts from: the supernet on a copy of ``model``, calibrated, with its references."""
    return build(model, Samples.of(images), space, SETTINGS, 0, None, device, Reporter())[1]


def make(name: str, model: nn.Module, images: Tensor, evaluator: Callable[[], Evaluator]) -> Step:
    """The step of a name in :data:`STEPS`.

    Args:
        name: see there.
        model: the float network; the float step takes it over.
        images: a batch for the float step.
        evaluator: gives what the others start from; the parallel layers use its supernet up.
    """
    if name == FLOAT:
        return FloatStep(model, images)
    return ParallelStep(evaluator()) if name == PARALLEL else SearchStep(evaluator(), *SEARCHES[name])

"""The recipe for networks that enlarge pictures: settings, and the run that Lightning makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

from torch import nn

from dqss.checks import check_positive
from dqss.data.base import CalibrationDataModule
from dqss.data.super_resolution import SuperResolutionData
from dqss.errors import DataError, ModelError, UserError
from dqss.lit.checkpoint import Deadline, SafeKeeping
from dqss.lit.recipe import Recipe, Trained, TrainingRun
from dqss.lit.running import CHECKPOINTS, restored, run_steps
from dqss.lit.stages import Stages
from dqss.lit.super_resolution import SuperResolutionTraining, measure, measure_bicubic
from dqss.models.blocks import SuperResolver

FILE = CHECKPOINTS / "train.ckpt"


@dataclass(frozen=True)
class SuperResolutionRecipe(Recipe):
    """How a network that enlarges pictures is trained (arXiv 2205.07514); the recipe group.

    Attributes:
        stages: steps of each; a stage starts from the last one's weights, with the rates at their height.
        contrastive: weight of the contrastive loss beside L1: one for all stages, or one for each.
        batch_size: patches a step.
        learning_rate: at its highest; Adam.
        ramp: share of a stage in which the rate rises; then it falls to 0 with a cosine.
        decay: of the averaged weights, which are measured and written; 0: no average.
        measure_every: steps between two rows of ``history.csv``, each with a validation PSNR.
        checkpoint_every: steps.
        max_minutes: limit on the wall clock; what has been reached then is written.
    """

    stages: Sequence[int] = (2000, 2000)
    contrastive: float | Sequence[float] = 0.0
    batch_size: int = 16
    learning_rate: float = 1e-3
    ramp: float = 0.05
    decay: float = 0.999
    measure_every: int = 200
    checkpoint_every: int = 100
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))  # a list where a file gave them
        check_positive(self, "recipe", "batch_size", "learning_rate", "measure_every", "checkpoint_every")
        check_positive(self, "recipe", "max_minutes", optional=True)
        if not self.stages or min(self.stages) < 1:
            raise UserError(
                f"recipe.stages={list(self.stages)}: expected the steps of each stage: [2000, 2000]"
            )
        if len(self._weights()) != len(self.stages) or min(self._weights()) < 0:
            raise UserError(
                f"recipe.contrastive={self.contrastive}: expected a weight of 0 or more for all "
                f"{len(self.stages)} stages, or a list of one for each"
            )
        if not 0 <= self.decay < 1 or not 0 <= self.ramp <= 1:
            raise UserError(f"recipe.decay={self.decay} recipe.ramp={self.ramp}: expected shares in 0..1")

    def check(self, data: CalibrationDataModule) -> None:
        """See :meth:`Recipe.check`."""
        if not isinstance(data, SuperResolutionData):
            raise DataError(
                f"data={type(data).__name__.lower()} has no pictures to enlarge: use photographs, or "
                "pictures with data.calibration_dir=FOLDER"
            )

    def train(self, module: nn.Module, data: CalibrationDataModule, run: TrainingRun) -> Trained:
        """See :meth:`Recipe.train`; an interrupted one goes on from its checkpoint.

        Raises:
            ModelError: for a network that is none of ours, whose range and scale are not known.
        """
        if not isinstance(module, SuperResolver):
            raise ModelError(
                f"{type(module).__name__} is no network that enlarges pictures: see model=rlfn_x2"
            )
        assert isinstance(data, SuperResolutionData)
        task = SuperResolutionTraining(
            module.train(), data, self.plan(), self.batch_size, self.decay, self.measure_every, run.seed
        )
        self._fit(task, run)
        network = task.average.cpu()
        score, bicubic = measure(network, data), measure_bicubic(data)
        if score is None or bicubic is None:
            return Trained(network, nan, "no validation pictures")
        return Trained(network, score, f"validation psnr {score:.2f} dB, bicubic {bicubic:.2f} dB")

    def plan(self) -> Stages:
        """The stages."""
        return Stages(list(self.stages), self._weights(), self.learning_rate, self.ramp)

    def _weights(self) -> list[float]:
        if isinstance(self.contrastive, Sequence):
            return list(self.contrastive)
        return [self.contrastive] * len(self.stages)

    def _fit(self, task: SuperResolutionTraining, run: TrainingRun) -> None:
        checkpoint, start = restored(task, run.folder, FILE)
        with run.reporter.stage("train", task.steps) as stage:
            stage.advance(start)
            deadline, every = Deadline(self.max_minutes), self.checkpoint_every
            keeping = SafeKeeping(run.folder, every, deadline, 1.0, run.reporter, stage, FILE)
            run_steps(task, keeping, run.reporter, run.trainer, False, checkpoint, start)

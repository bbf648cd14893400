"""Plain supervised training of a classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.data.base import CalibrationDataModule
from dqss.data.in_memory import InMemoryData
from dqss.errors import DataError
from dqss.lit.recipe import Recipe, Trained, TrainingRun
from dqss.metrics import as_read


class ClassifierTraining(pl.LightningModule):
    """Cross-entropy, SGD with Nesterov momentum, and a cosine from the learning rate to zero.

    Logs ``train_loss`` and ``val_accuracy`` in 0..1.

    Args:
        module: maps inputs to logits ``[N, classes]``.
        learning_rate: at the start.
        weight_decay: on all parameters.
        momentum: of SGD.
    """

    def __init__(
        self, module: nn.Module, learning_rate: float = 0.1, weight_decay: float = 5e-4, momentum: float = 0.9
    ) -> None:
        super().__init__()
        self.module = module
        self.learning_rate, self.weight_decay, self.momentum = learning_rate, weight_decay, momentum

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of a batch."""
        inputs, targets = batch
        loss = F.cross_entropy(self.module(inputs), targets)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count correct answers."""
        inputs, targets = batch
        correct = self.module(inputs).argmax(dim=1).eq(targets).float().mean()
        self.log("val_accuracy", correct, prog_bar=True, batch_size=len(targets))

    def configure_optimizers(self) -> Any:
        """SGD, and a cosine over all steps of the run."""
        optimizer = torch.optim.SGD(
            self.module.parameters(),
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.momentum > 0,
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class ClassifierRecipe(Recipe):
    """How a classifier is trained; the recipe group of the configuration.

    Attributes:
        epochs: passes over the training images.
        measure_every: epochs between two measurements of the validation images.
        learning_rate, weight_decay, momentum: see :class:`ClassifierTraining`.
    """

    epochs: int = 60
    measure_every: int = 5
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    momentum: float = 0.9

    def check(self, data: CalibrationDataModule) -> None:
        """See :meth:`Recipe.check`."""
        if not isinstance(data, InMemoryData):
            raise DataError(
                f"data={type(data).__name__.lower()} has no training part for classifiers: use digits or "
                "cifar10"
            )

    def train(self, module: nn.Module, data: CalibrationDataModule, run: TrainingRun) -> Trained:
        """See :meth:`Recipe.train`; goes through in one piece."""
        pl.seed_everything(run.seed, workers=True, verbose=False)
        task = ClassifierTraining(module.train(), self.learning_rate, self.weight_decay, self.momentum)
        runner = pl.Trainer(
            **run.trainer,
            max_epochs=self.epochs,
            check_val_every_n_epoch=self.measure_every,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        runner.fit(task, datamodule=data)
        (result,) = runner.validate(task, datamodule=data, verbose=False)
        accuracy = result["val_accuracy"]
        return Trained(module.eval(), accuracy, f"validation {as_read('top1', accuracy)}")

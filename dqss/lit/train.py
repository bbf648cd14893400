"""Plain supervised training of a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def train_classifier(
    module: nn.Module,
    data: pl.LightningDataModule,
    optimizer: Mapping[str, float],
    trainer: Mapping[str, Any],
    seed: int,
) -> float:
    """Train ``module`` in place.

    Args:
        module: maps inputs to logits.
        data: with a training and a validation loader.
        optimizer: arguments of :class:`ClassifierTraining`.
        trainer: arguments of :class:`pytorch_lightning.Trainer`.
        seed: of batch order and augmentation.

    Returns:
        Validation accuracy in 0..1.
    """
    pl.seed_everything(seed, workers=True, verbose=False)
    task = ClassifierTraining(module.train(), **optimizer)
    runner = pl.Trainer(**trainer)
    runner.fit(task, datamodule=data)
    (result,) = runner.validate(task, datamodule=data, verbose=False)
    module.eval()
    return result["val_accuracy"]

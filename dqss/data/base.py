"""What a data group gives: calibration inputs, and labelled batches to measure on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from dqss.errors import DataError
from dqss.metrics import task_metric
from dqss.models.loaded import InputConfig
from dqss.samples import Samples


class CalibrationDataModule(pl.LightningDataModule):
    """Inputs of one network.

    Order of use: :meth:`configure`, then any of the others, any number of times.

    Attributes:
        task: what outputs mean: ``"classification"`` for logits, ``"super_resolution"`` for pictures.
        batch_size: images in a batch of the loaders.
    """

    task: str = "classification"
    batch_size: int = 64

    def configure(self, input: InputConfig | None, num_classes: int | None = None) -> None:
        """Make transforms follow the network.

        Args:
            input: the images that the network expects, or None where it does not say.
            num_classes: its number of logits, to check labels against.

        Raises:
            DataError: if this data cannot be given that form.
        """
        if input is not None and input.scale > 1 and self.task == "classification":
            name = type(self).__name__.lower()
            raise DataError(
                f"data={name} is for classifiers, and the model enlarges pictures: choose data=pictures or "
                "data=photographs"
            )
        self.input, self.num_classes = input, num_classes

    @abstractmethod
    def calibration(self) -> Samples:
        """The inputs to search on; targets are kept where they are known, and not needed.

        Raises:
            DataError: if there are none.
        """

    def train_dataloader(self) -> DataLoader[Any]:
        """Augmented batches ``(inputs, targets)`` to train with; QAT has an order and a size of its own.

        Raises:
            DataError: for data that has no training part.
        """
        raise DataError(f"data={type(self).__name__.lower()} has no training part, which method=qat needs")

    @abstractmethod
    def val_dataloader(self) -> DataLoader[Any] | None:
        """Batches ``(inputs, targets)`` to measure on, read lazily; None where there are none.

        ``targets`` is an integer tensor ``[N]``, a picture for networks that make pictures, or None
        for unlabelled data.
        """

    def metric(self) -> tuple[str, Callable[[], Any] | None]:
        """Name and factory of what outputs are measured by; no factory where there is nothing."""
        return task_metric(self.task, self.num_classes)

    @abstractmethod
    def summary(self) -> str:
        """One line for people: what and how many."""


def positive(name: str, value: int) -> int:
    """``value``, if it is at least one.

    Raises:
        DataError: if it is not, naming the option.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(f"data.{name}={value}: expected a whole number of at least 1")
    return value

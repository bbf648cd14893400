"""Data groups whose images fit in memory: one training part, one validation part."""

from __future__ import annotations

import logging
from abc import abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dqss.data.arrays import ArrayDataset, Augment, Collate, Normalize
from dqss.data.base import CalibrationDataModule, positive
from dqss.models.loaded import InputConfig
from dqss.samples import Samples

_log = logging.getLogger(__name__)


class InMemoryData(CalibrationDataModule):
    """Calibration images are a fixed random choice of training images; validation is apart.

    Args:
        calibration_images: how many.
        batch_size: images in a batch of the loaders.
        seed: of the choice of calibration images.
        augment: what training does to images.

    Raises:
        DataError: for numbers below one.
    """

    default_input: InputConfig

    def __init__(self, calibration_images: int, batch_size: int, seed: int, augment: Augment) -> None:
        super().__init__()
        self.calibration_images = positive("calibration_images", calibration_images)
        self.batch_size = positive("batch_size", batch_size)
        self.seed, self.augment = seed, augment
        self.configure(None)

    @abstractmethod
    def load(self) -> tuple[ArrayDataset, ArrayDataset]:
        """The training and the validation part."""

    @cached_property
    def parts(self) -> tuple[ArrayDataset, ArrayDataset]:
        """The training and the validation part, read once."""
        return self.load()

    @property
    def normalize(self) -> Normalize:
        """Pixels to inputs of the network."""
        return Normalize(self.input or self.default_input)

    def calibration(self) -> Samples:
        """See :meth:`CalibrationDataModule.calibration`."""
        train = self.parts[0]
        count = self.calibration_images
        if count > len(train):
            _log.warning("data.calibration_images=%d: there are %d, all are used", count, len(train))
        chosen = self.choose(train.labels, min(count, len(train)))
        inputs = self.normalize(train.pixels(chosen))
        return Samples(list(inputs), list(train.labels[chosen]))

    def choose(self, labels: Tensor, count: int) -> list[int]:
        """Indices of ``count`` images in random order, classes in proportion to their sizes."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(labels), generator=generator)
        grouped = order[torch.argsort(labels[order], stable=True)]
        spread = torch.div(torch.arange(count) * len(labels), count, rounding_mode="floor")
        chosen: list[int] = grouped[spread][torch.randperm(count, generator=generator)].tolist()
        return chosen

    def train_dataloader(self) -> DataLoader[Any]:
        """See :meth:`CalibrationDataModule.train_dataloader`; shuffled."""
        collate = Collate(self.normalize, self.augment)
        return DataLoader(self.parts[0], self.batch_size, shuffle=True, drop_last=True, collate_fn=collate)

    def val_dataloader(self) -> DataLoader[Any] | None:
        """See :meth:`CalibrationDataModule.val_dataloader`."""
        return DataLoader(self.parts[1], self.batch_size, collate_fn=Collate(self.normalize))

    def summary(self) -> str:
        """See :meth:`CalibrationDataModule.summary`."""
        train, validation = self.parts
        count = min(self.calibration_images, len(train))
        return (
            f"{type(self).__name__.lower()}: {count} calibration images out of {len(train)} training images, "
            f"{len(validation)} validation images"
        )

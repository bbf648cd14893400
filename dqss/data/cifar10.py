"""CIFAR-10, as torchvision reads it."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.datasets import CIFAR10

from dqss.data.arrays import ArrayDataset, Augment
from dqss.data.in_memory import InMemoryData
from dqss.errors import DataError
from dqss.models.loaded import InputConfig


class Cifar10(InMemoryData):
    """50,000 training and 10,000 validation images of 32x32 pixels in ten classes.

    Args:
        root: folder that holds or shall hold ``cifar-10-batches-py``.
        download: fetch it where it is missing.
        calibration_images: how many of the training images to search on.
        batch_size: images in a batch of the loaders.
        seed: of the choice of calibration images.
    """

    default_input = InputConfig(size=(3, 32, 32))

    def __init__(
        self,
        root: str | Path = "data",
        download: bool = False,
        calibration_images: int = 512,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(calibration_images, batch_size, seed, Augment(shift=4, mirror=True))
        self.root, self.download = Path(root).expanduser(), download

    def load(self) -> tuple[ArrayDataset, ArrayDataset]:
        """See :meth:`InMemoryData.load`.

        Raises:
            DataError: if the files are missing or damaged, or cannot be fetched.
        """
        return self._part(train=True), self._part(train=False)

    def _part(self, train: bool) -> ArrayDataset:
        try:
            # torchvision compares checksums before it reads these files, which are pickles.
            part = CIFAR10(str(self.root), train=train, download=self.download)
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"CIFAR-10 is not in {self.root} ({reason}); give data.root=FOLDER or data.download=true"
            ) from error
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2)
        return ArrayDataset(images, torch.tensor(part.targets))

"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, nothing to download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from dqss.data.arrays import ArrayDataset, Augment
from dqss.data.in_memory import InMemoryData
from dqss.models.loaded import InputConfig

_VALIDATION = 599
# The parts must not move with the user's seed: the shipped weights were trained on one of them.
_SPLIT_SEED = 0


class Digits(InMemoryData):
    """1,198 training and 599 validation images, ten classes in equal parts in both.

    Args:
        calibration_images: how many of the training images to search on.
        batch_size: images in a batch of the loaders.
        seed: of the choice of calibration images.
    """

    default_input = InputConfig(size=(1, 8, 8), mean=(0.5,), std=(0.5,))

    def __init__(self, calibration_images: int = 512, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__(calibration_images, batch_size, seed, Augment(shift=1))

    def load(self) -> tuple[ArrayDataset, ArrayDataset]:
        """See :meth:`InMemoryData.load`."""
        digits = load_digits()
        images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target).to(torch.int64)
        parts = train_test_split(
            range(len(labels)), test_size=_VALIDATION, stratify=digits.target, random_state=_SPLIT_SEED
        )
        train, validation = (ArrayDataset(images[part], labels[part], top=16) for part in parts)
        return train, validation

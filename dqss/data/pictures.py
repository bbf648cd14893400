"""Folders of pictures for networks that enlarge them."""

from __future__ import annotations

from pathlib import Path

from dqss.data.image_files import given_folders
from dqss.data.pairs import Pair, find_pairs
from dqss.data.super_resolution import SuperResolutionData


class Pictures(SuperResolutionData):
    """Pictures from folders; :mod:`dqss.data.pairs` has the layouts.

    Args:
        calibration_dir: pictures to search or train on.
        validation_dir: pictures to measure on, or None.
        calibration_images: how many patches to search on.
        patch: pixels a side of a low-resolution patch; None for what the network was trained on.
        seed: of the choice of patches.

    Raises:
        DataError: for numbers below one, or no calibration folder.
    """

    def __init__(
        self,
        calibration_dir: str | Path | None = None,
        validation_dir: str | Path | None = None,
        calibration_images: int = 32,
        patch: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(calibration_images, patch, seed)
        self.calibration_dir, self.validation_dir = given_folders(calibration_dir, validation_dir)

    def training_pairs(self) -> list[Pair]:
        """See :func:`dqss.data.pairs.find_pairs`."""
        return find_pairs(self.calibration_dir, self.scale, "data.calibration_dir")

    def validation_pairs(self) -> list[Pair] | None:
        """See :func:`dqss.data.pairs.find_pairs`."""
        if self.validation_dir is None:
            return None
        return find_pairs(self.validation_dir, self.scale, "data.validation_dir")

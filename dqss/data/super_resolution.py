"""Data for networks that enlarge pictures: patches to search or train on, whole pictures to measure."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dqss.data.base import CalibrationDataModule, positive
from dqss.data.image_files import image_size
from dqss.data.paired_images import PairedImages
from dqss.data.pairs import Pair
from dqss.data.patches import Patches
from dqss.errors import DataError
from dqss.image_quality import PsnrY
from dqss.metrics import PSNR
from dqss.models.loaded import InputConfig
from dqss.samples import Samples

_WHITE = 255.0
EPOCH_PATCHES = 16
"""Patches of each picture that are an epoch of training."""
TRAIN_BATCH = 16


class SuperResolutionData(CalibrationDataModule):
    """Inputs are low-resolution images in the network's range, targets the pictures in the same.

    Args:
        calibration_images: how many patches to search on; not turned or mirrored.
        patch: pixels a side of a low-resolution patch; None for what the network was trained on.
        seed: of the choice of patches.

    Raises:
        DataError: for numbers below one.
    """

    task = "super_resolution"
    # Whole pictures differ in size.
    batch_size = 1
    scale: int
    peak: float
    size: int
    smallest: int

    def __init__(self, calibration_images: int, patch: int | None, seed: int) -> None:
        super().__init__()
        self.calibration_images = positive("calibration_images", calibration_images)
        self.patch = None if patch is None else positive("patch", patch)
        self.seed = seed

    @abstractmethod
    def training_pairs(self) -> list[Pair]:
        """Pictures to search or train on."""

    @abstractmethod
    def validation_pairs(self) -> list[Pair] | None:
        """Pictures to measure on; None where there are none."""

    def configure(self, input: InputConfig | None, num_classes: int | None = None) -> None:
        """See :meth:`CalibrationDataModule.configure`.

        Raises:
            DataError: unless the network enlarges colour images of a range from zero on, and takes
                images as small as a patch.
        """
        super().configure(input, num_classes)
        name = type(self).__name__.lower()
        if input is None or input.scale < 2:
            raise DataError(
                f"data={name} is for networks that enlarge pictures, and this model does not say that it "
                "does: choose one such as model=rlfn_x4, or give model.input.scale"
            )
        if input.size[0] != 3:
            raise DataError(f"the model expects images of {input.size[0]} channels: data={name} has 3")
        if any(input.mean) or len(set(input.std)) > 1:
            raise DataError(
                f"data={name} gives images of range 0..1/std: give model.input.mean=[0,0,0] and one std, "
                "and put any other normalization into the model"
            )
        self.scale, self.peak = input.scale, 1 / input.std[0]
        self.size, self.smallest = self.patch or min(input.size[1:]), input.smallest
        if self.size < self.smallest:
            raise DataError(
                f"data.patch={self.size}: the network takes images of at least "
                f"{self.smallest}x{self.smallest} pixels"
            )
        # What was found for another scale is not for this one.
        for found in ("training", "validation"):
            self.__dict__.pop(found, None)

    @cached_property
    def training(self) -> PairedImages:
        """Pictures to search or train on."""
        return PairedImages(self.training_pairs(), self.scale)

    @cached_property
    def validation(self) -> PairedImages | None:
        """Pictures to measure on, or None."""
        pairs = self.validation_pairs()
        # Each is read once a pass: keeping them would gain little.
        return None if pairs is None else PairedImages(pairs, self.scale, cache_bytes=0)

    def calibration(self) -> Samples:
        """See :meth:`CalibrationDataModule.calibration`."""
        patches = Patches(self.training, self.size, self.calibration_images, self.seed, augment=False)
        pairs = [self.units(*patches[index]) for index in range(len(patches))]
        return Samples([low for low, _ in pairs], [high for _, high in pairs])

    def train_dataloader(self) -> DataLoader[Any]:
        """See :meth:`CalibrationDataModule.train_dataloader`: patches, turned and mirrored."""
        return DataLoader(self.patches(EPOCH_PATCHES * len(self.training)), batch_size=TRAIN_BATCH)

    def patches(self, count: int) -> Dataset[tuple[Tensor, Tensor]]:
        """So many patches to train with, turned and mirrored, in the network's range."""
        patches = Patches(self.training, self.size, count, self.seed, augment=True)
        return _InUnits(patches, self.units)

    def val_dataloader(self) -> DataLoader[Any] | None:
        """Whole pictures one by one, ``[1, 3, h, w]`` and ``[1, 3, scale h, scale w]``.

        Raises:
            DataError: for pictures that are too small for the network, here and not after a search.
        """
        if self.validation is None:
            return None
        for pair in self.validation.pairs:
            height, width = (side // self.scale for side in image_size(pair.high))
            if min(height, width) < self.smallest:
                raise DataError(
                    f"{pair.high} is {height}x{width} pixels when shrunk: the network takes images of at "
                    f"least {self.smallest}x{self.smallest}; leave it out"
                )
        return DataLoader(_InUnits(_Whole(self.validation), self.units), batch_size=1)

    def metric(self) -> tuple[str, Callable[[], Any] | None]:
        """See :meth:`CalibrationDataModule.metric`: PSNR on luma, in dB, without a border of the scale."""
        return PSNR, lambda: PsnrY(self.peak, self.scale)

    def units(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in 0..255 as the network has them: floats in ``0..peak``."""
        return low.float() * (self.peak / _WHITE), high.float() * (self.peak / _WHITE)

    def summary(self) -> str:
        """See :meth:`CalibrationDataModule.summary`."""
        validation = "no" if self.validation is None else len(self.validation)
        name, patches = type(self).__name__.lower(), f"{self.calibration_images} patches"
        return (
            f"{name}: {patches} of {self.size}x{self.size} out of {len(self.training)} pictures, enlarged "
            f"x{self.scale}; {validation} pictures to measure on"
        )


class _InUnits(Dataset[tuple[Tensor, Tensor]]):
    """Pairs in the network's range."""

    def __init__(
        self, pairs: Patches | _Whole, units: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        self.pairs, self.units = pairs, units

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.units(*self.pairs[index])


class _Whole(Dataset[tuple[Tensor, Tensor]]):
    """Whole pairs."""

    def __init__(self, images: PairedImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index].whole()

"""Folders of image files, flat or with one folder a class."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dqss.data.base import CalibrationDataModule, positive
from dqss.data.image_files import SkippedImages, given_folders, image_files, read_image, spread
from dqss.data.image_items import ImageItems
from dqss.data.labels import Labelling, labels_of
from dqss.errors import DataError
from dqss.models.loaded import InputConfig
from dqss.samples import Samples

_log = logging.getLogger(__name__)
Transform = Callable[[Image.Image], Tensor]
Batch = tuple[Tensor, Tensor | None]
SCALE = (0.35, 1.0)
"""Areas of the crops to train with: milder than for a training from scratch, as tuning wants it."""
_DEFAULT_INPUT = InputConfig(size=(3, 224, 224), interpolation="bicubic", crop_pct=0.875)


class ImageFolder(CalibrationDataModule):
    """Images from folders, resized and normalized as the network expects them.

    Args:
        calibration_dir: images to search on; labels are not needed.
        validation_dir: images to measure on, or None; labelled if they lie in class folders
            (:func:`dqss.data.labels.labels_of` has the rules).
        calibration_images: how many to take, evenly spread over the sorted files.
        validation_images: how many to measure on, evenly spread; None for all.
        batch_size: images in a batch of the loaders.
        num_workers: processes that decode; 0 decodes in this one.
        seed: moves the evenly spread choice of calibration images.
        train_dir: images to train with (QAT), or None; labelled by their class folders, and without
            labels trained towards the float network's outputs.

    Raises:
        DataError: for numbers below one, or no calibration folder.
    """

    def __init__(
        self,
        calibration_dir: str | Path | None = None,
        validation_dir: str | Path | None = None,
        calibration_images: int = 256,
        validation_images: int | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        train_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.train_dir = None if train_dir is None else Path(train_dir).expanduser()
        self.calibration_dir, self.validation_dir = given_folders(calibration_dir, validation_dir)
        self.calibration_images = positive("calibration_images", calibration_images)
        self.validation_images = (
            None if validation_images is None else positive("validation_images", validation_images)
        )
        self.batch_size = positive("batch_size", batch_size)
        if num_workers < 0:
            raise DataError(f"data.num_workers={num_workers}: expected 0 or more")
        self.num_workers = num_workers
        self.seed = seed
        self.configure(None)

    def configure(self, input: InputConfig | None, num_classes: int | None = None) -> None:
        """See :meth:`CalibrationDataModule.configure`."""
        super().configure(input, num_classes)
        config = input or _DEFAULT_INPUT
        if config.size[0] not in (1, 3):
            raise DataError(f"the model expects images of {config.size[0]} channels: imagefolder has 1 or 3")
        self.mode = "RGB" if config.size[0] == 3 else "L"
        shared: dict[str, Any] = {
            "interpolation": config.interpolation,
            "mean": config.mean,
            "std": config.std,
        }
        self.transform: Transform = create_transform(
            config.size, crop_pct=config.crop_pct, crop_mode=config.crop_mode, **shared
        )
        self.augment: Transform = create_transform(
            config.size, is_training=True, scale=SCALE, color_jitter=0.0, **shared
        )

    def calibration(self) -> Samples:
        """See :meth:`CalibrationDataModule.calibration`."""
        files, labelling = self._chosen(
            self.calibration_dir, "calibration", self.calibration_images, self.seed
        )
        skipped = SkippedImages(str(self.calibration_dir))
        images, kept = self.read(files, skipped)
        skipped.close()
        if not images:
            raise DataError(
                f"data.calibration_dir={self.calibration_dir}: none of {len(files)} images is readable"
            )
        labels = labelling.labels
        targets = None if labels is None else [torch.tensor(labels[position]) for position in kept]
        return Samples(images, targets)

    def train_dataloader(self) -> DataLoader[Any]:
        """See :meth:`CalibrationDataModule.train_dataloader`: random crops, mirrored or not."""
        if self.train_dir is None:
            raise DataError(
                "data.train_dir is not given, which method=qat needs: a folder of images to train"
            )
        files, labelling = self._chosen(self.train_dir, "train", None)
        if labelling.labels is None:
            _log.warning("%s is used without labels: %s", self.train_dir, labelling.reason)
        items = ImageItems(files, labelling.labels, self.mode, self.augment)
        return DataLoader(
            items, self.batch_size, shuffle=True, num_workers=self.num_workers, collate_fn=ImageItems.collate
        )

    def val_dataloader(self) -> DataLoader[Any] | None:
        """See :meth:`CalibrationDataModule.val_dataloader`."""
        if self.validation_dir is None:
            return None
        files, labelling = self._chosen(self.validation_dir, "validation", self.validation_images)
        if labelling.labels is None:
            _log.warning("%s is used without labels: %s", self.validation_dir, labelling.reason)
        batches = _Batches(self, files, labelling.labels)
        return DataLoader(batches, batch_size=None, num_workers=self.num_workers)

    def summary(self) -> str:
        """See :meth:`CalibrationDataModule.summary`."""
        found = len(image_files(self.calibration_dir, "data.calibration_dir"))
        line = (
            f"imagefolder: {min(found, self.calibration_images)} of {found} images in {self.calibration_dir}"
        )
        if self.validation_dir is None:
            return f"{line}; no validation images"
        files, labelling = self._chosen(self.validation_dir, "validation", self.validation_images)
        kind = "unlabelled" if labelling.labels is None else "labelled"
        return f"{line}; {len(files)} {kind} validation images in {self.validation_dir}"

    def _chosen(
        self, folder: Path, part: str, count: int | None, seed: int = 0
    ) -> tuple[list[Path], Labelling]:
        """Files to read, with their labels."""
        files = image_files(folder, f"data.{part}_dir")
        if count is not None and count > len(files):
            _log.warning("data.%s_images=%d: %s has %d, all are used", part, count, folder, len(files))
        chosen = range(len(files)) if count is None else spread(len(files), count, seed)
        every = labels_of(files, folder, self.num_classes)
        if every.labels is not None:
            every = Labelling([every.labels[index] for index in chosen])
        return [files[index] for index in chosen], every

    def read(self, files: Sequence[Path], skipped: SkippedImages) -> tuple[list[Tensor], list[int]]:
        """The inputs of the readable files, and their positions in ``files``."""
        images, kept = [], []
        for position, file in enumerate(files):
            try:
                image = read_image(file, self.mode)
            except ValueError as error:
                skipped.add(file, error)
                continue
            images.append(self.transform(image))
            kept.append(position)
        return images, kept


class _Batches(IterableDataset[Batch]):
    """Whole batches, so that one with an unreadable image is smaller and none is empty."""

    def __init__(self, data: ImageFolder, files: Sequence[Path], labels: Sequence[int] | None) -> None:
        self.data, self.files, self.labels = data, files, labels

    def __len__(self) -> int:
        return -(-len(self.files) // self.data.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        size = self.data.batch_size
        skipped, given = SkippedImages(str(self.data.validation_dir)), 0
        for start in range(first * size, len(self.files), step * size):
            images, kept = self.data.read(self.files[start : start + size], skipped)
            given += len(images)
            if images:
                labels = self.labels
                targets = None if labels is None else torch.tensor([labels[start + index] for index in kept])
                yield torch.stack(images), targets
        skipped.close()
        if skipped.count and not given and not worker:
            raise DataError(
                f"data.validation_dir={self.data.validation_dir}: none of {skipped.count} images is readable"
            )

"""Image files as a dataset to train with: one at a time, augmented, whatever some of them hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dqss.data.image_files import read_image
from dqss.errors import DataError

_log = logging.getLogger(__name__)
Item = tuple[Tensor, int | None]


class ImageItems(Dataset[Item]):
    """Files, each with its label or with none.

    A file that cannot be read is replaced by the next one that can, so that its place in the epochs
    stays, and a long training does not end on it.

    Args:
        files: to read.
        labels: one a file, or None.
        mode: ``"RGB"`` or ``"L"``.
        transform: an image to an input; may draw from the global generators.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Sequence[int] | None,
        mode: str,
        transform: Callable[[Image.Image], Tensor],
    ) -> None:
        self.files, self.labels, self.mode, self.transform = files, labels, mode, transform
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        """The input ``[C, H, W]`` and its label.

        Raises:
            IndexError: out of range.
            DataError: if no file can be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        for position in (*range(index, len(self)), *range(index)):
            image = self._read(position)
            if image is not None:
                return self.transform(image), None if self.labels is None else self.labels[position]
        raise DataError(f"data.train_dir: none of {len(self)} images is readable")

    def _read(self, position: int) -> Image.Image | None:
        if position in self._unreadable:
            return None
        try:
            return read_image(self.files[position], self.mode)
        except ValueError as error:
            self._unreadable.add(position)
            _log.warning("%s: %s; the next image takes its place", self.files[position], error)
            return None

    @staticmethod
    def collate(items: Sequence[Item]) -> tuple[Tensor, Tensor | None]:
        """A batch ``[N, C, H, W]`` and its labels ``[N]``; None where there are none."""
        labels = [label for _, label in items if label is not None]
        return torch.stack([image for image, _ in items]), torch.tensor(labels) if labels else None

"""Small images held in memory as bytes; batches are made, resized and normalized on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from dqss.errors import DataError
from dqss.models.loaded import InputConfig


@dataclass(frozen=True)
class Normalize:
    """Pixels in 0..1, ``[N, C, h, w]``, to the input ``[N, C', H, W]`` of a network."""

    input: InputConfig

    def __call__(self, pixels: Tensor) -> Tensor:
        """Repeat a grey channel, resize, subtract the mean, divide by the deviation."""
        channels, height, width = self.input.size
        if pixels.shape[1] == 1 and channels > 1:
            pixels = pixels.expand(-1, channels, -1, -1)
        if pixels.shape[1] != channels:
            raise DataError(f"images have {pixels.shape[1]} channels, the model expects {channels}")
        if pixels.shape[2:] != (height, width):
            mode = "bicubic" if self.input.interpolation == "bicubic" else "bilinear"
            pixels = F.interpolate(pixels, (height, width), mode=mode, antialias=True).clamp(0, 1)
        mean = torch.tensor(self.input.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.input.std).view(1, -1, 1, 1)
        return (pixels - mean) / std


class ArrayDataset(Dataset[tuple[Tensor, int]]):
    """Images ``[N, C, h, w]`` uint8 of range 0..``top``, with labels ``[N]``; items are pixels in 0..1."""

    def __init__(self, images: Tensor, labels: Tensor, top: int = 255) -> None:
        self.images, self.labels, self.top = images, labels, top

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Pixels ``[C, h, w]`` in 0..1 and the label."""
        return self.images[index] / self.top, int(self.labels[index])

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Pixels ``[len(indices), C, h, w]`` in 0..1."""
        return self.images[list(indices)] / self.top


@dataclass(frozen=True)
class Collate:
    """A batch of items: stacked, augmented where training asks for it, normalized."""

    normalize: Normalize
    augment: Callable[[Tensor], Tensor] | None = None

    def __call__(self, items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """``(inputs [N, C, H, W], targets [N])``."""
        pixels = torch.stack([pixel for pixel, _ in items])
        if self.augment is not None:
            pixels = self.augment(pixels)
        return self.normalize(pixels), torch.tensor([label for _, label in items])


@dataclass(frozen=True)
class Augment:
    """Random shifts by up to ``shift`` pixels, zeros moving in, and random mirroring."""

    shift: int
    mirror: bool = False

    def __call__(self, pixels: Tensor) -> Tensor:
        """Another view of each image, drawn from torch's global generator."""
        count, _, height, width = pixels.shape
        padded = F.pad(pixels, (self.shift,) * 4)
        corners = torch.randint(2 * self.shift + 1, (count, 2)).tolist()
        flips = torch.rand(count).lt(0.5).tolist() if self.mirror else [False] * count
        views = []
        for image, (top, left), flip in zip(padded, corners, flips, strict=True):
            view = image[:, top : top + height, left : left + width]
            views.append(view.flip(-1) if flip else view)
        return torch.stack(views)

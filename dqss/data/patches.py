"""Random patches of pictures: which, is a function of seed and index alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dqss.data.paired_images import PairedImages
from dqss.errors import DataError

_SYMMETRIES = 8


class Patches(Dataset[tuple[Tensor, Tensor]]):
    """Patches ``[3, size, size]`` with what they should become, both uint8.

    A patch depends on nothing but ``seed`` and ``index``: not on those before it, on workers, or on
    torch's generators. Training thus goes on where it stopped. Every picture comes once in as many
    patches as there are pictures.

    Args:
        images: where they are cut from.
        size: pixels a side, of the low-resolution version.
        count: how many there are; indices beyond it are just as good.
        seed: another seed, other patches.
        augment: turn and mirror them: each is one of the eight symmetries of the square.

    Raises:
        DataError: if there are no pictures.
    """

    def __init__(
        self, images: PairedImages, size: int, count: int, seed: int = 0, *, augment: bool = True
    ) -> None:
        if not len(images):
            raise DataError("patches cannot be cut out of no pictures")
        self.images, self.size, self.count = images, size, count
        self.seed, self.augment = seed, augment

    def __len__(self) -> int:
        """How many patches there are."""
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The patch and its picture ``[3, scale size, scale size]``.

        Raises:
            DataError: if the picture is smaller than a patch, or cannot be read.
        """
        if index < 0:
            raise IndexError(index)
        random = np.random.default_rng((self.seed, index))
        chosen = self.picture(index)
        pair = self.images[chosen]
        if min(pair.size) < self.size:
            raise DataError(
                f"{self.images.pairs[chosen].high} is {pair.size[0]}x{pair.size[1]} pixels when shrunk: too "
                f"small for patches of {self.size}; give smaller patches or larger pictures"
            )
        top, left = (int(random.integers(side - self.size + 1)) for side in pair.size)
        symmetry = int(random.integers(_SYMMETRIES)) if self.augment else 0
        low, high = pair.window(top, left, self.size, self.size)
        return transformed(low, symmetry), transformed(high, symmetry)

    def picture(self, index: int) -> int:
        """Which picture: each round through them has an order of its own."""
        rounds, position = divmod(index, len(self.images))
        order = np.random.default_rng((self.seed, rounds, 0)).permutation(len(self.images))
        return int(order[position])


def transformed(image: Tensor, symmetry: int) -> Tensor:
    """One of the eight symmetries of the square of ``[..., H, W]``: quarter turns, then a mirror.

    Args:
        image: the picture.
        symmetry: ``0..7``; 0 is the picture itself.
    """
    turned = torch.rot90(image, symmetry % 4, dims=(-2, -1))
    return (turned.flip(-1) if symmetry >= 4 else turned).contiguous()

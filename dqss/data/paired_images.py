"""Pictures and their low-resolution versions: what is read from their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dqss.data.bicubic import margin, shrink
from dqss.data.image_files import read_image
from dqss.data.pairs import Pair
from dqss.errors import DataError

_GIB = 2**30


def read_pixels(path: Path) -> Tensor:
    """A picture as ``[3, H, W]`` uint8.

    Grey and palette pictures become colour, an alpha channel is dropped if it hides nothing, and of
    16 bits the upper eight are kept.

    Raises:
        DataError: if the file is no picture, is damaged, or has transparent pixels.
    """
    try:
        pixels = np.array(read_image(path, "RGB", opaque=True))
    except ValueError as error:
        raise DataError(f"{path} cannot be used: {error}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


@dataclass(frozen=True)
class OpenPair:
    """A pair as pixels.

    Attributes:
        high: the picture ``[3, H, W]`` uint8.
        low: its low-resolution version ``[3, h, w]``, or None to make it on the fly.
        scale: factor between the two.
    """

    high: Tensor
    low: Tensor | None
    scale: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the low-resolution version."""
        # What the scale does not divide may have been cut off the picture, or not.
        return self.high.shape[1] // self.scale, self.high.shape[2] // self.scale

    def whole(self) -> tuple[Tensor, Tensor]:
        """``[3, h, w]`` and ``[3, scale h, scale w]``."""
        return self.window(0, 0, *self.size)

    def window(self, top: int, left: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """What cutting a part out of the whole gives, without shrinking the whole.

        Args:
            top, left, height, width: in pixels of the low-resolution version, inside of it.

        Returns:
            ``[3, height, width]`` and ``[3, scale height, scale width]``.
        """
        picture = self._cut(top, left, top + height, left + width)
        if self.low is not None:
            return self.low[:, top : top + height, left : left + width], picture
        rows, columns = self.size
        edge = margin(self.scale)
        above, before = min(edge, top), min(edge, left)
        bottom, right = min(rows, top + height + edge), min(columns, left + width + edge)
        small = shrink(self._cut(top - above, left - before, bottom, right), self.scale)
        return small[:, above : above + height, before : before + width], picture

    def _cut(self, top: int, left: int, bottom: int, right: int) -> Tensor:
        """Of the picture, in pixels of the low-resolution version."""
        scale = self.scale
        return self.high[:, scale * top : scale * bottom, scale * left : scale * right]


class PairedImages:
    """Pairs, read when they are asked for and kept while there is room.

    Args:
        pairs: what to read.
        scale: factor between the sides of the two.
        cache_bytes: how much memory decoded pictures may take.
    """

    def __init__(self, pairs: Sequence[Pair], scale: int, cache_bytes: int = _GIB) -> None:
        self.pairs, self.scale = list(pairs), scale
        self._room, self._kept = cache_bytes, dict[Path, Tensor]()

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> OpenPair:
        """One of them.

        Raises:
            DataError: if a file cannot be read, or the sizes do not belong together.
        """
        pair = self.pairs[index]
        opened = OpenPair(
            self._read(pair.high), None if pair.low is None else self._read(pair.low), self.scale
        )
        if min(opened.size) < 1:
            raise DataError(f"{pair.high} is {_size(opened.high)} pixels: too small for x{self.scale}")
        if opened.low is not None and opened.size != tuple(opened.low.shape[1:]):
            raise DataError(
                f"{pair.low} is {_size(opened.low)} pixels and {pair.high} {_size(opened.high)}: at "
                f"x{self.scale}, {opened.size[0]}x{opened.size[1]} were expected"
            )
        return opened

    def _read(self, path: Path) -> Tensor:
        if path in self._kept:
            return self._kept[path]
        pixels = read_pixels(path)
        if pixels.numel() <= self._room:
            self._room -= pixels.numel()
            self._kept[path] = pixels
        return pixels


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[2]}"

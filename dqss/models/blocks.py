"""What the super-resolution networks share: their base, the way up, what they say about bad input."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dqss.errors import DataError, ModelError


@dataclass(frozen=True)
class Frame:
    """Where a tile lies in the image that it was cut from; pixels.

    Attributes:
        top, left: of the tile.
        height, width: of the whole image.
    """

    top: int
    left: int
    height: int
    width: int


class SuperResolver(nn.Module):
    """A network that enlarges colour images.

    Maps ``[N, 3, H, W]`` to ``[N, 3, scale H, scale W]``, both in the range ``0..peak``.

    Attributes:
        scale: factor between the sides of output and input.
        peak: value of white.
        smallest: least height and width that it takes, in pixels.
        alignment: tiles start at multiples of so many pixels.
        reach: how many pixels away from a pixel an input may lie that changes its output.
    """

    scale: int
    peak: float = 1.0
    smallest: int = 1
    alignment: int = 1
    reach: int

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """See the class.

        Raises:
            DataError: for anything but colour images of at least ``smallest`` pixels a side.
        """

    def forward_tile(self, tile: Tensor, frame: Frame) -> Tensor:
        """The output for a tile, right wherever it is ``reach`` pixels away from edges that are cuts."""
        output: Tensor = self(tile)
        return output

    def check(self, x: Tensor) -> None:
        """Refuse what the network cannot take, before a layer deep inside does so in other words."""
        check_images(x, type(self).__name__, self.smallest)


def check_images(x: Tensor, name: str, smallest: int) -> None:
    """Refuse what a network for colour images cannot take.

    Args:
        x: a batch of images.
        name: the network, for the message.
        smallest: least height and width in pixels.

    Raises:
        DataError: unless ``x`` is a floating ``[N, 3, H, W]`` with sides of at least ``smallest``.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        grey = ": repeat the grey channel three times" if x.ndim == 4 and x.shape[1] == 1 else ""
        raise DataError(f"{name} takes colour images [N, 3, H, W], not {list(x.shape)}{grey}")
    if not x.is_floating_point():
        raise DataError(f"{name} takes floating-point images, not {x.dtype}: convert them with .float()")
    if min(x.shape[2:]) < smallest:
        raise DataError(
            f"{name} takes images of at least {smallest}x{smallest} pixels, not "
            f"{x.shape[2]}x{x.shape[3]}: pad them, or give larger ones"
        )


def check_scale(scale: int, known: Sequence[int] = (2, 3, 4)) -> int:
    """``scale``, if networks are trained for it.

    Raises:
        ModelError: if they are not.
    """
    if scale not in known:
        raise ModelError(f"model.scale={scale}: expected {', '.join(map(str, known[:-1]))} or {known[-1]}")
    return scale


def pixel_shuffle(channels: int, scale: int, outputs: int = 3) -> nn.Sequential:
    """A 3x3 convolution to ``outputs * scale^2`` channels, rearranged (arXiv 1609.05158).

    Maps ``[N, channels, H, W]`` to ``[N, outputs, scale H, scale W]``.
    """
    return nn.Sequential(nn.Conv2d(channels, outputs * scale**2, 3, padding=1), nn.PixelShuffle(scale))

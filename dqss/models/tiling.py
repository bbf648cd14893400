"""Large images piece by piece, so that memory depends on the tile and not on the image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dqss.errors import DataError, ModelError
from dqss.models.blocks import Frame, SuperResolver


@dataclass(frozen=True)
class Tiles:
    """How an image is cut; both are rounded up to the network's alignment.

    Attributes:
        size: pixels of the input that a tile adds to the picture, to each side.
        margin: pixels around it that are computed and thrown away; None for the network's reach,
            with which the picture is that of the whole image up to rounding. Less is faster, and
            wrong near the seams by what the network sees beyond it.
    """

    size: int = 256
    margin: int | None = None

    def __post_init__(self) -> None:
        """Refuse sizes below one.

        Raises:
            ModelError: for them.
        """
        if self.size < 1 or (self.margin or 0) < 0:
            raise ModelError(f"tiles of {self.size} pixels with a margin of {self.margin}: too small")


@torch.no_grad()
def upscale(model: SuperResolver, images: Tensor, tiles: Tiles | None = None) -> Tensor:
    """Enlarge whole images.

    Args:
        model: the network, float or quantized; static ranges only if it is tiled, since ranges that
            follow the input would differ from tile to tile.
        images: ``[N, 3, H, W]`` in ``0..model.peak``.
        tiles: how to cut them, or None for all at once.

    Returns:
        ``[N, 3, scale H, scale W]``, not clipped to the range.

    Raises:
        DataError: for images that the network cannot take, or whose range is not its own.
    """
    model.check(images)
    check_range(images, model)
    if tiles is None:
        whole: Tensor = model(images)
        return whole
    scale, (height, width) = model.scale, images.shape[2:]
    out = images.new_empty(len(images), 3, scale * height, scale * width)
    for top, bottom, first, last in _spans(height, tiles, model):
        for left, right, begin, end in _spans(width, tiles, model):
            frame = Frame(first, begin, height, width)
            piece = model.forward_tile(images[:, :, first:last, begin:end], frame)
            rows = slice(scale * (top - first), scale * (bottom - first))
            columns = slice(scale * (left - begin), scale * (right - begin))
            out[:, :, scale * top : scale * bottom, scale * left : scale * right] = piece[:, :, rows, columns]
    return out


def check_range(images: Tensor, model: SuperResolver) -> None:
    """Refuse images whose values are in another unit than the network's.

    Args:
        images: whole images, of which at least one is not almost black.
        model: the network.

    Raises:
        DataError: naming both ranges.
    """
    low, top = float(images.min()), float(images.max())
    way_out = ""
    if low < -0.5 * model.peak:
        way_out = "undo their normalization"
    elif model.peak > 1 and 0 < top <= 1:
        way_out = f"multiply them by {model.peak:g}"
    elif top > 2 * model.peak:
        way_out = f"divide them by {255 / model.peak:g}"
    if way_out:
        raise DataError(
            f"the images are in {low:.3g}..{top:.3g}, and {type(model).__name__} expects "
            f"0..{model.peak:g}: {way_out}"
        )


def _spans(length: int, tiles: Tiles, model: SuperResolver) -> Iterator[tuple[int, int, int, int]]:
    """Along one axis: begin and end of what each tile adds, and of what it is computed from."""
    size = _round_up(tiles.size, model.alignment)
    margin = _round_up(model.reach if tiles.margin is None else tiles.margin, model.alignment)
    least = _round_up(model.smallest, model.alignment)
    for begin in range(0, length, size):
        end = min(length, begin + size)
        # The last tile may be narrower than the network takes: it then begins earlier.
        first = max(0, min(begin - margin, (length - least) // model.alignment * model.alignment))
        last = min(length, max(end + margin, first + least))
        yield begin, end, first, last


def _round_up(pixels: int, alignment: int) -> int:
    return -(-pixels // alignment) * alignment

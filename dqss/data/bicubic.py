"""Bicubic resizing as MATLAB's ``imresize`` does it, which the field's test images were made with.

The kernel is Keys' cubic with a = -1/2, stretched by the factor where an image shrinks, so that it
is averaged before it is sampled. What the library functions of this name do differs from it: at
the edges, or by leaving out the stretching.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dqss.errors import DataError

# Pixels to each side that the kernel covers where nothing shrinks.
_SUPPORT = 2


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Images of another size.

    Edges are continued by their last pixel, as MATLAB did when the usual test sets were made
    (newer versions mirror; nothing else differs). The height is resized before the width; integers are
    rounded after each of the two, as MATLAB does: with that, the test sets come out bit for bit.

    Args:
        images: ``[..., H, W]``, uint8 in 0..255 or floating.
        height, width: of the result.

    Returns:
        ``[..., height, width]`` of the same type; floats are not clipped to any range.

    Raises:
        DataError: for sizes below one, or values of another type.
    """
    if min(height, width, *images.shape[-2:]) < 1:
        raise DataError(f"images of {list(images.shape[-2:])} pixels cannot be made {height}x{width}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise DataError(f"images of type {images.dtype} cannot be resized: give uint8 or floats")
    return _along(_along(images, -2, height), -1, width)


def shrink(images: Tensor, scale: int) -> Tensor:
    """Low-resolution versions, smaller by ``scale``: :func:`resize` of :func:`crop_to_multiple`.

    Raises:
        DataError: for images of fewer than ``scale`` pixels a side.
    """
    images = crop_to_multiple(images, scale)
    return resize(images, images.shape[-2] // scale, images.shape[-1] // scale)


def crop_to_multiple(images: Tensor, scale: int) -> Tensor:
    """Images ``[..., H, W]`` without the rows and columns at the end that ``scale`` does not divide."""
    height, width = images.shape[-2:]
    return images[..., : height - height % scale, : width - width % scale]


def margin(scale: int) -> int:
    """Pixels of the small image beside a place that an image shrunk by ``scale`` depends on there."""
    # Half the kernel's width is two small pixels, whatever the scale.
    return _SUPPORT if scale > 1 else 0


def _along(images: Tensor, axis: int, length: int) -> Tensor:
    """Resize one axis; sums in double precision, since the test sets' rounding is that of doubles."""
    indices, weights = _taps(images.shape[axis], length)
    source = images.double()
    total = torch.zeros((), dtype=torch.float64)
    shape = (-1, 1) if axis == -2 else (-1,)
    for index, weight in zip(indices, weights, strict=True):
        total = total + source.index_select(axis, index) * weight.view(shape)
    if images.is_floating_point():
        return total.to(images.dtype)
    # Halves go up; torch.round would take them to the even neighbour.
    return (total + 0.5).floor().clamp(0, 255).to(images.dtype)


@lru_cache(maxsize=64)
def _taps(length: int, target: int) -> tuple[Tensor, Tensor]:
    """For each tap, where each of ``target`` pixels looks and how much it counts, ``[taps, target]``."""
    factor = target / length
    stretch = max(1.0, 1 / factor)
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) / factor - 0.5
    reach = _SUPPORT * stretch
    # One more to each side than fits: weights outside of the kernel are zero.
    first = (centre - reach).floor()
    taps = torch.arange(int(2 * reach) + 3, dtype=torch.float64).view(-1, 1)
    places = first + taps
    weights = _cubic((centre - places) / stretch)
    return places.long().clamp(0, length - 1), weights / weights.sum(dim=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))

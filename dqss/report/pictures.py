"""Tensors as small pictures in a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dqss.io import ensure_folder, write_bytes_atomic

PICTURES = "pictures"
"""Folder of a run that has the pictures of its page as files."""
_PNG = "data:image/png;base64,"
THUMBNAIL, CROP = 96, 128
"""Largest side in pixels of a whole input, and of a piece of an output."""


def is_picture(tensor: Tensor) -> bool:
    """Whether ``[C, H, W]`` can be shown: grey or in three colours, and larger than a dot."""
    return tensor.ndim == 3 and tensor.shape[0] in (1, 3) and min(tensor.shape[1:]) >= 4


def data_uri(picture: Tensor, low: float, high: float) -> str:
    """A PNG of ``[C, H, W]`` as a data URI; ``low`` becomes black and ``high`` white."""
    scaled = (picture.detach().float().cpu() - low) / max(high - low, 1e-12)
    pixels = (scaled.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    image = Image.fromarray(np.squeeze(pixels, 2) if pixels.shape[2] == 1 else pixels)
    image.save(buffer, "PNG", optimize=True)
    return _PNG + base64.b64encode(buffer.getvalue()).decode()


def write_pictures(pictures: Mapping[str, str], folder: Path, prefix: str) -> None:
    """Pictures of a page as files: ``PREFIX_best_uniform.png``.

    Args:
        pictures: data URIs by name, as :func:`crops` gives them.
        folder: is made if it is not there.
        prefix: of the file names.
    """
    ensure_folder(folder)
    for name, uri in pictures.items():
        content = base64.b64decode(uri.removeprefix(_PNG))
        write_bytes_atomic(folder / f"{prefix}_{name.replace(' ', '_')}.png", content)


def thumbnail(picture: Tensor) -> str:
    """A whole input ``[C, H, W]``, made smaller; its own smallest and largest value are black and white."""
    small = picture.detach().float().cpu()
    share = THUMBNAIL / max(small.shape[1:])
    if share < 1:
        size = [max(1, round(side * share)) for side in small.shape[1:]]
        small = F.interpolate(small[None], size, mode="bilinear", antialias=True)[0]
    return data_uri(small, float(small.min()), float(small.max()))


def worst_corner(error: Tensor, size: tuple[int, int], grid: int) -> tuple[int, int]:
    """Where a window has the largest sum.

    Args:
        error: ``[H, W]``, not negative.
        size: of the window, at most that of ``error``.
        grid: the corner's coordinates are multiples of it.

    Returns:
        Row and column of the window's first corner.
    """
    sums = F.avg_pool2d(error.detach().float().cpu()[None, None], size, stride=grid)[0, 0]
    row, column = divmod(int(sums.argmax()), sums.shape[1])
    return row * grid, column * grid


def crops(source: Tensor, outputs: dict[str, Tensor], first: str, last: str) -> dict[str, str]:
    """The same piece of several pictures, where two of them differ most.

    Args:
        source: the input, ``[C, h, w]``; its piece goes first where the outputs are enlarged by
            a whole number.
        outputs: ``[C, H, W]`` by name, shown with one scale of values.
        first, last: names of the two; their absolute difference is added, as bright as can be.
    """
    wanted, found = outputs[first].float().cpu(), outputs[last].float().cpu()
    difference = (found - wanted).abs()
    height, width = wanted.shape[1:]
    ratio = height // source.shape[1] if height % source.shape[1] == 0 else 0
    if ratio * source.shape[2] != width:
        ratio = 0
    grid = max(ratio, 1)
    size = tuple(max(grid, min(CROP, side) // grid * grid) for side in (height, width))
    top, left = worst_corner(difference.square().sum(0), (size[0], size[1]), grid)
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    low, high = (float(extreme) for extreme in torch.aminmax(wanted[:, rows, columns]))
    pictures = {}
    if ratio and is_picture(source):
        piece = source[:, top // ratio : (top + size[0]) // ratio, left // ratio : (left + size[1]) // ratio]
        pictures["input"] = data_uri(piece, float(piece.min()), float(piece.max()))
    pictures |= {name: data_uri(output[:, rows, columns], low, high) for name, output in outputs.items()}
    piece = difference[:, rows, columns]
    pictures["difference"] = data_uri(piece, 0.0, float(piece.max()))
    return pictures

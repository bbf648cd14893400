"""Residual local feature networks for super-resolution (arXiv 2205.07514).

Names of tensors are those of the published weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.models.blocks import Frame, SuperResolver, check_scale, pixel_shuffle

_SLOPE = 0.05
_STRIDE, _POOL, _POOL_STRIDE = 2, 7, 3
# One cell of the attention's coarse map is so many pixels.
_CELL = _STRIDE * _POOL_STRIDE


class RLFN(SuperResolver):
    """Enlarges images of range 0..255 (:class:`dqss.models.blocks.SuperResolver` has the shapes).

    Args:
        scale: 2, 3 or 4.
        channels: of the features.
        blocks: number of residual local feature blocks.
        inner: channels inside a block; None for ``channels``.

    Raises:
        ModelError: for another scale.
    """

    peak = 255.0
    # Fewer pixels leave the attention's pooling without a window.
    smallest = _STRIDE * (_POOL - 1) + 3
    alignment = _CELL

    def __init__(self, scale: int = 4, channels: int = 52, blocks: int = 6, inner: int | None = None) -> None:
        super().__init__()
        self.scale = check_scale(scale)
        self.conv_1 = nn.Conv2d(3, channels, 3, padding=1)
        self._blocks = [f"block_{number}" for number in range(1, blocks + 1)]
        for name in self._blocks:
            self.add_module(name, _ResidualLocalFeatureBlock(channels, inner or channels))
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.upsampler = pixel_shuffle(channels, scale)
        # Three 3x3 convolutions and the attention a block; three outside of them.
        self.reach = blocks * (3 + _Attention.reach) + 3

    def forward(self, x: Tensor, frame: Frame | None = None) -> Tensor:
        """See :class:`dqss.models.blocks.SuperResolver`; ``frame`` says that ``x`` is a tile."""
        self.check(x)
        features = self.conv_1(x)
        deep = features
        for name in self._blocks:
            deep = self.get_submodule(name)(deep, frame)
        enlarged: Tensor = self.upsampler(self.conv_2(deep) + features)
        return enlarged

    def forward_tile(self, tile: Tensor, frame: Frame) -> Tensor:
        """See :meth:`dqss.models.blocks.SuperResolver.forward_tile`."""
        return self.forward(tile, frame)


class _ResidualLocalFeatureBlock(nn.Module):
    """Three 3x3 convolutions with leaky ReLU and a skip, a 1x1 convolution, attention."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.c1_r = nn.Conv2d(channels, inner, 3, padding=1)
        self.c2_r = nn.Conv2d(inner, inner, 3, padding=1)
        self.c3_r = nn.Conv2d(inner, channels, 3, padding=1)
        self.c5 = nn.Conv2d(channels, channels, 1)
        self.esa = _Attention(channels)

    def forward(self, x: Tensor, frame: Frame | None) -> Tensor:
        out = x
        for layer in (self.c1_r, self.c2_r, self.c3_r):
            out = F.leaky_relu(layer(out), _SLOPE)
        attended: Tensor = self.esa(self.c5(out + x), frame)
        return attended


class _Attention(nn.Module):
    """Enhanced spatial attention: a mask from a coarse map, stretched over the image, and the features."""

    # What lies where: stretching moves a cell by up to 15 pixels against the 6 x 15 that it was
    # pooled from, because the pooling drops what does not fill a window and the stretching does not
    # know; interpolation and the 3x3 convolution reach one cell further, to either side.
    reach = 28

    def __init__(self, channels: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1)
        self.conv_f = nn.Conv2d(width, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, stride=_STRIDE)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.conv4 = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor, frame: Frame | None) -> Tensor:
        narrow = self.conv1(x)
        coarse = self.conv3(F.max_pool2d(self.conv2(narrow), _POOL, _POOL_STRIDE))
        mask = torch.sigmoid(self.conv4(_stretch(coarse, x, frame) + self.conv_f(narrow)))
        return x * mask


def _stretch(coarse: Tensor, x: Tensor, frame: Frame | None) -> Tensor:
    """The coarse map at the size of ``x``, bilinear."""
    height, width = x.shape[2:]
    if frame is None:
        return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    # The whole image's map is stretched by a factor that depends on the image's size: a tile that
    # stretched its own part by itself would end up elsewhere, however large its margins.
    rows = _stretch_tile(coarse, 2, frame.top, height, frame.height)
    return _stretch_tile(rows, 3, frame.left, width, frame.width)


def _stretch_tile(coarse: Tensor, axis: int, start: int, count: int, whole: int) -> Tensor:
    """Along one axis, the part for ``count`` pixels from ``start`` on of the map of ``whole`` pixels.

    ``coarse`` is the part of the whole map that begins at pixel ``start``, a multiple of a cell.
    """
    cells = _cells(whole)
    real = torch.promote_types(coarse.dtype, torch.float32)
    pixels = torch.arange(start, start + count, dtype=real, device=coarse.device)
    place = ((pixels + 0.5) * (cells / whole) - 0.5).clamp(min=0)
    low = place.floor().long()
    high = (low + 1).clamp(max=cells - 1)
    first, last = start // _CELL, coarse.shape[axis] - 1
    share = (place - low).to(coarse.dtype).view([-1 if axis == number else 1 for number in range(4)])
    # Beyond the tile there is nothing: what lies so near to a cut is thrown away anyway.
    before = coarse.index_select(axis, (low - first).clamp(0, last))
    after = coarse.index_select(axis, (high - first).clamp(0, last))
    return before + share * (after - before)


def _cells(pixels: int) -> int:
    """Length of the coarse map of so many pixels: a 3x3 stride, then the pooling, both unpadded."""
    return ((pixels - 3) // _STRIDE + 1 - _POOL) // _POOL_STRIDE + 1

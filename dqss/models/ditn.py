"""Deployment-friendly inner-patch transformer networks for super-resolution (arXiv 2308.02794).

Tensors of the Real variant are meant to come in the order of the authors' code, under clearer names,
for ``checkpoint_mapping=order``; that was tried with a file made in that order, not with one of theirs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.models.blocks import SuperResolver, check_scale, pixel_shuffle

_PATCH = 8
# Pixels that one spatial-aware layer sees to each side: 5x5, 7x7 at every third pixel, 3x3.
_LAYER_REACH = 2 + 9 + 1


class TanhConvolution(nn.Module):
    """In place of a norm: tanh, then a 1x1 convolution; nothing to average, so fast on devices."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        out: Tensor = self.conv(torch.tanh(x))
        return out


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each pixel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to the same shape."""
        out: Tensor = self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


Normalize = Callable[[int], nn.Module]
"""From a number of channels to what stands in front of each half of a layer."""


class DITN(SuperResolver):
    """Enlarges images of range 0..1 (:class:`dqss.models.blocks.SuperResolver` has the shapes).

    Images are padded to whole patches by reflection, and the result is cropped again.

    Args:
        scale: 2, 3 or 4.
        units: number of unfold-once units.
        normalize: :class:`TanhConvolution` (Real) or :class:`ChannelNorm` (Tiny and full).
        channels: of the features.
        layers: inner-patch layers a unit, and as many spatial-aware ones.

    Raises:
        ModelError: for another scale.
    """

    # Reflection cannot give more pixels than there are: five can be made eight, four cannot.
    smallest = _PATCH // 2 + 1
    alignment = _PATCH

    def __init__(
        self,
        scale: int = 4,
        units: int = 1,
        normalize: Normalize = TanhConvolution,
        channels: int = 60,
        layers: int = 4,
    ) -> None:
        super().__init__()
        self.scale = check_scale(scale)
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.units = nn.Sequential(*(_UnfoldOnce(channels, layers, normalize) for _ in range(units)))
        self.body_end = nn.Conv2d(channels, channels, 3, padding=1)
        self.upsampler = pixel_shuffle(channels, scale)
        # A patch sees all of itself; three 3x3 convolutions stand outside of the units.
        self.reach = units * (_PATCH - 1 + layers * _LAYER_REACH) + 3

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`dqss.models.blocks.SuperResolver`."""
        self.check(x)
        height, width = x.shape[2:]
        below, right = -height % _PATCH, -width % _PATCH
        x = F.pad(x, (0, right, 0, below), mode="reflect")
        features = self.head(x)
        deep = self.body_end(self.units(features))
        enlarged: Tensor = self.upsampler(deep + features)
        return enlarged[:, :, : height * self.scale, : width * self.scale]


def unfold(x: Tensor, size: int) -> Tensor:
    """Patches of an image, row by row: ``[N, C, H, W]`` to ``[N H/size W/size, C, size, size]``.

    Args:
        x: images.
        size: of a patch; divides H and W.
    """
    count, channels, height, width = x.shape
    grid = x.reshape(count, channels, height // size, size, width // size, size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, size, size)


def fold(patches: Tensor, height: int, width: int) -> Tensor:
    """The images ``[N, C, height, width]`` of patches: the inverse of :func:`unfold`."""
    channels, size = patches.shape[1:3]
    grid = patches.reshape(-1, height // size, width // size, channels, size, size)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)


class _UnfoldOnce(nn.Module):
    """Layers inside patches, then layers across them."""

    def __init__(self, channels: int, layers: int, normalize: Normalize) -> None:
        super().__init__()
        self.inner = nn.Sequential(*(_InnerPatchLayer(channels, normalize) for _ in range(layers)))
        self.spatial = nn.Sequential(*(_SpatialAwareLayer(channels, normalize) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.inner(unfold(x, _PATCH))
        out: Tensor = self.spatial(fold(patches, x.shape[2], x.shape[3]))
        return out


class _Layer(nn.Module):
    """A transformer layer: attention and feed-forward net, each behind a norm and beside a skip."""

    attn: nn.Module
    ffn: nn.Module
    norm1: nn.Module
    norm2: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.ffn(self.norm2(x))
        return out


class _InnerPatchLayer(_Layer):
    """Sees the patch."""

    # The two kinds of layers differ in the order of their parts, to follow the authors' order.
    def __init__(self, channels: int, normalize: Normalize) -> None:
        super().__init__()
        self.attn = _InnerPatchAttention(channels)
        self.norm1, self.norm2 = normalize(channels), normalize(channels)
        self.ffn = _FeedForward(channels)


class _SpatialAwareLayer(_Layer):
    """Sees what lies around."""

    def __init__(self, channels: int, normalize: Normalize) -> None:
        super().__init__()
        self.attn = _SpatialAttention(channels)
        self.ffn = _FeedForward(channels)
        self.norm1, self.norm2 = normalize(channels), normalize(channels)


class _FeedForward(nn.Module):
    """1x1 up, 3x3 depthwise, one half gates the other, 1x1 down."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.project_in = nn.Conv2d(channels, wide, 1, bias=False)
        self.dwconv = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.project_out = nn.Conv2d(wide // 2, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        out: Tensor = self.project_out(F.gelu(gate) * value)
        return out


class _InnerPatchAttention(nn.Module):
    """Attention between channels: each is a vector of the pixels of its patch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1, 1, 1))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)  # [patches, pixels, channels]
        q, k, v = self.qkv(pixels).transpose(1, 2).chunk(3, dim=1)
        # Both along the pixels, so that products are cosines whatever the range of the features.
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2)
        mixed = (scores * self.temperature).softmax(dim=-1) @ v
        out: Tensor = self.project_out(mixed.reshape(x.shape))
        return out


class _SpatialAttention(nn.Module):
    """A large kernel in three cheap parts gates one half of an expansion."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # From zero on, so that an untrained layer does no harm.
        self.scale = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.kernel = nn.Sequential(
            nn.Conv2d(channels, channels, 5, padding=2, groups=channels),
            nn.Conv2d(channels, channels, 7, padding=9, dilation=3, groups=channels),
            nn.Conv2d(channels, channels, 1),
        )
        self.project_in = nn.Conv2d(channels, 2 * channels, 1)
        self.project_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.project_in(x).chunk(2, dim=1)
        out: Tensor = self.project_out(value * self.kernel(gate)) * self.scale
        return out

"""The baseline of enhanced deep residual networks for super-resolution (arXiv 1707.02921).

Names of tensors are those of the authors' torch code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dqss.models.blocks import SuperResolver, check_scale, pixel_shuffle

# Mean colour of DIV2K's training images, as a share of white.
_MEAN = (0.4488, 0.4371, 0.4040)


class EDSR(SuperResolver):
    """Enlarges images of range 0..255 (:class:`dqss.models.blocks.SuperResolver` has the shapes).

    Args:
        scale: 2, 3 or 4.
        channels: of the features.
        blocks: number of residual blocks.

    Raises:
        ModelError: for another scale.
    """

    peak = 255.0

    def __init__(self, scale: int = 4, channels: int = 64, blocks: int = 16) -> None:
        super().__init__()
        self.scale = check_scale(scale)
        self.sub_mean = _Shift([-self.peak * value for value in _MEAN])
        self.add_mean = _Shift([self.peak * value for value in _MEAN])
        self.head = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1))
        body = [_ResidualBlock(channels) for _ in range(blocks)]
        self.body = nn.Sequential(*body, nn.Conv2d(channels, channels, 3, padding=1))
        self.tail = nn.Sequential(_upsampler(channels, scale), nn.Conv2d(channels, 3, 3, padding=1))
        # 3x3 convolutions: two a block, two around them, and less than two pixels' worth on the way up.
        self.reach = 2 * blocks + 4

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`dqss.models.blocks.SuperResolver`."""
        self.check(x)
        features = self.head(self.sub_mean(x))
        enlarged: Tensor = self.add_mean(self.tail(self.body(features) + features))
        return enlarged


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions and the identity; no norm, which would take the range out of features."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class _Shift(nn.Module):
    """Adds a colour. Published files hold it as a frozen 1x1 convolution, whose tensors these are."""

    weight: Tensor
    bias: Tensor

    def __init__(self, colour: list[float]) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(3).view(3, 3, 1, 1))
        self.register_buffer("bias", torch.tensor(colour))

    def forward(self, x: Tensor) -> Tensor:
        # As a convolution it would be one more layer to quantize, and nothing is gained by that.
        return x + self.bias.view(-1, 1, 1)


def _upsampler(channels: int, scale: int) -> nn.Sequential:
    """The way up: by two twice for four, otherwise at once."""
    steps = [2, 2] if scale == 4 else [scale]
    return nn.Sequential(*(layer for step in steps for layer in pixel_shuffle(channels, step, channels)))

"""Residual networks for small images (arXiv 1512.03385, section 4.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dqss.errors import ModelError


class _Shortcut(nn.Module):
    """Option A: every second pixel, and zeros for the new channels; no parameters."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        before = (self.channels - x.shape[1]) // 2
        after = self.channels - x.shape[1] - before
        return F.pad(x, (0, 0, 0, 0, before, after))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and the identity."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        same = stride == 1 and inputs == channels
        self.shortcut = nn.Identity() if same else _Shortcut(channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of ``depth = 6 n + 2`` layers with parameter-free shortcuts.

    Maps images ``[N, in_channels, H, W]`` to logits ``[N, num_classes]``; H and W of 4 or more.

    Args:
        depth: 20, 32, 44, 56, 110 or any other ``6 n + 2``.
        num_classes: number of logits.
        in_channels: channels of the image.
        width: channels of the first stage; the second and third have two and four times as many.

    Raises:
        ModelError: if ``depth`` is not of the form ``6 n + 2``.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        blocks, remainder = divmod(depth - 2, 6)
        if remainder or blocks < 1:
            raise ModelError(f"resnet of depth {depth}: expected 6 n + 2, such as 20, 32, 44 or 56")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.linear = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, in_channels, H, W]``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean(dim=(2, 3)))
        return logits


def _stage(inputs: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = _BasicBlock(inputs, channels, stride)
    return nn.Sequential(first, *(_BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

"""A small residual network, a strategy for it, and what repairs it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.bundle import Bundle
from dqss.repair import RepairSettings
from search_spaces import uniform
from tests.support.nets import bundle_of, prepared_supernet

FAST: dict[str, Any] = {"iterations": 60, "batch_size": 16, "learning_rate": 0.05}


class Block(nn.Module):
    """Two convolutions, a shortcut, and a ReLU outside any module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.norm(self.conv1(x)))))


class Residual(nn.Module):
    """A stem with its ReLU, two blocks, a head; inputs ``[N, 3, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.act(self.stem(x))).mean((2, 3)))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Residual().eval()


def pictures(count: int = 48, seed: int = 1) -> Tensor:
    """Smooth ones: neighbouring pixels must have something to do with one another."""
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, (8, 8), mode="bilinear")


def strategy_for(
    model: nn.Module,
    inputs: Tensor,
    weight_bits: int = 3,
    bits: int = 8,
    symmetric: bool = True,
    algorithm: str = "minmax",
) -> Bundle:
    """Min-max, each layer and its input; another ``algorithm`` for weights."""
    space = uniform(weight_bits, bits, [algorithm], ["minmax"], weight_symmetric=symmetric)
    prepared, supernet = prepared_supernet(model, inputs, space)
    return bundle_of(prepared, supernet, dict.fromkeys(supernet.decisions, 0), inputs[:4])


def settings(**options: Any) -> RepairSettings:
    return RepairSettings(**{**FAST, **options})

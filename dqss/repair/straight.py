"""Rounding that is hard on the way forward, while whether it is up or down is learned straight through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dqss.functional import dequantize
from dqss.mixing import Codes, Grid

MARGIN = 0.05
"""How far from the middle a weight begins that was not rounded to the nearest code."""


class StraightRounding(nn.Module):
    """A weight at one of its two neighbouring codes; used as the parametrization of the float weight.

    It begins at codes that are given. The variable of a weight that is rounded to the nearest code is its
    distance from the code below it in steps, so that those turn first that were nearly in the middle; the
    variable of any other is close to the middle, on the side of its code. Gradients pass the decision
    straight through (arXiv 1308.3432): what is learned is the network that will be used, and needs no
    annealing.

    Args:
        weight: float.
        codes: where it begins.

    Attributes:
        h: the variables, in the weight's shape; up from one half on.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor

    def __init__(self, weight: Tensor, codes: Codes) -> None:
        super().__init__()
        self.grid: Grid = codes.grid
        scale, zero_point = (part.to(weight.device) for part in self.grid.shaped(weight.shape))
        places = weight.detach().to(torch.float32) / scale + zero_point
        now = codes.integers.to(places)
        floor = torch.floor(places)
        # Clipped, or moved far by an algorithm: then its code and the next one on the weight's own side.
        near = (now == floor) | (now == floor + 1)
        low = torch.where(near, floor, torch.where(places > now, now, now - 1))
        up = now > low
        fraction = (places - low).clamp(0, 1)
        beside = torch.where(up, 0.5 + MARGIN, 0.5 - MARGIN)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("low", low)
        self.h = nn.Parameter(torch.where((fraction >= 0.5) == up, fraction, beside))

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight; its gradient is that of a weight between the codes."""
        spec = self.grid.spec
        # In this order the sum is exactly 0 or 1.
        decided = (self.h >= 0.5).to(self.h) + (self.h - self.h.detach())
        codes = torch.clamp(self.low + decided, spec.qmin, spec.qmax)
        return dequantize(codes, self.scale, self.zero_point).to(weight.dtype)

    @torch.no_grad()
    def confine(self) -> None:
        """Keep the variables in [0, 1], after a step."""
        self.h.clamp_(0, 1)

    @torch.no_grad()
    def codes(self) -> Codes:
        """Each weight at the code that it is rounded to."""
        spec = self.grid.spec
        return Codes.from_integers(torch.clamp(self.low + (self.h >= 0.5), spec.qmin, spec.qmax), self.grid)

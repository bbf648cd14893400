"""Rounding that is learned: up or down for each weight, by a soft variable (AdaRound, arXiv 2004.10568).

The step of the grid may learn with it, as in FlexRound (arXiv 2306.00317); the two codes of a weight stay
those of the grid that it began on, as in AdaRound.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dqss.functional import broadcast_channels, dequantize
from dqss.mixing import Codes, Grid

ZETA, GAMMA = 1.1, -0.1
"""Ends of the stretched sigmoid of eq. 23."""

FITTED = 0.9
"""How near to a code that was fitted a weight starts: such codes make up for one another."""


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``clip(sigmoid(v) (zeta - gamma) + gamma, 0, 1)``: eq. 23, which reaches both ends."""
    return torch.clamp(torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The v of which :func:`rectified_sigmoid` makes ``h``, which lies in [0, 1]."""
    return -torch.log((ZETA - GAMMA) / (h - GAMMA) - 1)


def regularizer(h: Tensor, beta: float) -> Tensor:
    """``mean(1 - |2 h - 1|^beta)``: eq. 24, 1 where all is undecided and 0 where all is decided.

    The paper sums; a mean does not depend on the size of the weight.
    """
    return (1 - (2 * h - 1).abs().pow(beta)).mean()


class SoftRounding(nn.Module):
    """A weight between its two neighbouring codes; used as the parametrization of the float weight.

    It starts at the float weight itself (where that is not clipped), and ends at one of the two
    codes that :meth:`codes` names. Codes that were fitted say more than the float weight: it starts near
    them then, a tenth of the way towards the weight (our own choice).

    Args:
        weight: float.
        grid: where it is rounded to.
        learn_step: whether the grid's steps learn.
        fitted: codes that are one of the two, in the weight's shape; None: those on either side of the
            weight.

    Attributes:
        v: the soft variables, in the weight's shape.
        shift: ``[C]``, the logarithm of the step over the grid's own.
    """

    began: Tensor
    zero_point: Tensor
    base: Tensor
    floor: Tensor

    def __init__(
        self, weight: Tensor, grid: Grid, learn_step: bool = False, fitted: Tensor | None = None
    ) -> None:
        super().__init__()
        self.grid = grid
        self.shift = nn.Parameter(torch.zeros_like(grid.scale), requires_grad=learn_step)
        scale, zero_point = (part.to(weight.device) for part in grid.shaped(weight.shape))
        base = torch.floor(zero_point)
        # Whole numbers, also where the zero point lies between two codes (DoReFa, arXiv 1606.06160).
        places = weight.detach().to(torch.float32) / scale + (zero_point - base)
        self.register_buffer("began", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("base", base)
        floor = torch.floor(places)
        up = places - floor
        if fitted is not None:
            chosen = fitted.to(places) - base
            floor = torch.where(chosen > floor, chosen - 1, chosen)
            up = torch.lerp((places - floor).clamp(0, 1), chosen - floor, FITTED)
        self.register_buffer("floor", floor)
        self.v = nn.Parameter(inverse_rectified_sigmoid(up))

    def h(self) -> Tensor:
        """How far up each weight is, in [0, 1]."""
        return rectified_sigmoid(self.v)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it stands, softly rounded; differentiable in :attr:`v`, and in :attr:`shift`."""
        spec, scale = self.grid.spec, self.began
        codes = torch.clamp(self.floor + self.h() + self.base, spec.qmin, spec.qmax)
        if self.shift.requires_grad:
            scale = broadcast_channels(self.scale(), weight.shape, spec.granularity)
        return dequantize(codes, scale, self.zero_point).to(weight.dtype)

    def scale(self) -> Tensor:
        """``[C]``: the step as it stands."""
        return self.grid.scale.to(self.shift) * self.shift.exp()

    @torch.no_grad()
    def codes(self) -> Codes:
        """Each weight at the nearer one of its two codes."""
        spec = self.grid.spec
        codes = self.floor + (self.h() >= 0.5) + self.base
        grid = replace(self.grid, scale=self.scale().detach()) if self.shift.requires_grad else self.grid
        return Codes.from_integers(torch.clamp(codes, spec.qmin, spec.qmax), grid)

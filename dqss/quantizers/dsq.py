"""DSQ: on the way back, rounding is a soft staircase whose sharpness is learned (arXiv 1908.05033)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dqss.formula import Formula, scale_gradient
from dqss.observers import Statistics
from dqss.observers.mse import MSE
from dqss.quantizers.learned import usable
from dqss.quantizers.lsq import LSQ, step_gradient_scale
from dqss.spec import Candidate, Role

_START, _SHARPEST, _SOFTEST = 0.2, 0.05, 0.49


@dataclass(frozen=True)
class SoftStaircase(Formula):
    """Rounding with the gradient of tanh between any two codes.

    With ``v = x / s`` clamped and i its integer part the staircase is (eq. 3 to 6) ``i + 1/2 +
    tanh(k (v - i - 1/2)) / (2 (1 - a))`` with ``k = log(2 / a - 1)``, which meets the codes at
    both ends; a in (0, 1/2) is how far it stays away from rounding. Values are rounded (eq. 7). The
    vectors are s, ``1 / s``, k, ``1 / (2 (1 - a))``, with the gradients of s and a through all of them.
    """

    arity: ClassVar[int] = 4
    learning: ClassVar[int] = 4

    def parts(self, x: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Formula.parts`."""
        step, inverse, sharpness, height = vectors
        inside = torch.clamp(x * inverse, self.qmin, self.qmax)
        begin = torch.floor(inside.detach())
        rise = torch.tanh(sharpness * (inside - begin - 0.5)) * height
        return torch.round(inside.detach()) * step.detach(), (begin + 0.5 + rise) * step


class DSQ(LSQ):
    """Learned step and sharpness of a symmetric grid, signed or unsigned.

    The paper learns both ends of the clip range; a grid without zero point has one step for both (our
    reading). It starts where the squared error is least; gradients of the step are scaled as LSQ's.
    """

    name: ClassVar[str] = "dsq"

    def __init__(self, candidate: Candidate, channels: int, role: Role) -> None:
        super().__init__(candidate, channels, role)
        self.formula = SoftStaircase(candidate.spec.qmin, candidate.spec.qmax)
        self.softness = nn.Parameter(torch.full((channels,), _START))

    def start(self, stats: Statistics) -> None:
        """See :meth:`LearnedQuantizer.start`."""
        scale, zero_point = MSE().solve(stats, self.candidate.spec)
        self.load_grid(usable(scale), zero_point)
        self.softness.fill_(_START)

    def learned(self, x: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Quantizer.learned`."""
        factor = step_gradient_scale(x, self)
        step, softness = (scale_gradient(part, factor) for part in (self.step, self.softness))
        return step, 1 / step, torch.log(2 / softness - 1), 1 / (2 * (1 - softness))

    @torch.no_grad()
    def constrain_(self) -> None:
        """See :meth:`LearnedQuantizer.constrain_`."""
        super().constrain_()
        self.softness.clamp_(_SHARPEST, _SOFTEST)

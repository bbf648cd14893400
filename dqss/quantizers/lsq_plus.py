"""LSQ+: step and offset are learned (arXiv 2004.09576)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dqss.formula import Formula, between, scale_gradient
from dqss.mixing import Grid
from dqss.observers import Statistics
from dqss.observers.mse import MSE
from dqss.quantizers.learned import LEAST, usable
from dqss.quantizers.lsq import LSQ, step_gradient_scale
from dqss.spec import Candidate, QuantSpec, Role


@dataclass(frozen=True)
class LearnedStepAndOffset(Formula):
    """``(clamp(round(x / s) + z, qmin, qmax) - z) * s`` with the vectors s, beta, ``1 / s``, z.

    The paper adds beta itself (eq. 3 and 4). To run in integer arithmetic, and to keep zero exact, z
    is ``-beta / s``, rounded and inside the grid: our reading. The derivatives are the paper's: by
    beta 0 inside and 1 outside, by s ``round(x / s) - x / s`` inside and the bound outside.
    """

    arity: ClassVar[int] = 4
    learning: ClassVar[int] = 2

    def parts(self, x: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Formula.parts`."""
        step, offset, inverse, zero_point = vectors
        places = x.detach() * inverse
        # Clamped as difference to the zero point: x / s + z would lose bits, and ties with them.
        clamped = between(places, self.qmin - zero_point, self.qmax - zero_point)
        inside, codes = places == clamped, torch.round(clamped)
        slope = codes + torch.where(inside, -places, zero_point)
        carrier = torch.where(inside, x, offset) + step * slope
        return codes * step.detach(), carrier


class LSQPlus(LSQ):
    """Learned step, and on affine grids a learned offset; for symmetric ones, LSQ with another start.

    Weights start at ``max(|mean - 3 std|, |mean + 3 std|) / 2^(b - 1)`` (eq. 8), activations where
    the squared error is least (section 3.3).
    """

    name: ClassVar[str] = "lsq_plus"
    offset: nn.Parameter

    def __init__(self, candidate: Candidate, channels: int, role: Role) -> None:
        super().__init__(candidate, channels, role)
        self.affine = not candidate.spec.symmetric
        if self.affine:
            self.formula = LearnedStepAndOffset(candidate.spec.qmin, candidate.spec.qmax)
            self.offset = nn.Parameter(torch.zeros(channels))

    @classmethod
    def refusal(cls, spec: QuantSpec, role: Role) -> str | None:
        """See :meth:`LearnedQuantizer.refusal`."""
        if role is Role.WEIGHT and not spec.mirrored:
            return "quantizes weights around zero: use weight_symmetric=true"
        return super(LSQ, cls).refusal(spec, role)

    def start(self, stats: Statistics) -> None:
        """See :meth:`LearnedQuantizer.start`."""
        if self.role is Role.WEIGHT:
            self.load_grid(usable(three_deviations(stats) / -self.formula.qmin), torch.zeros_like(self.step))
        else:
            scale, zero_point = MSE().solve(stats, self.candidate.spec)
            self.load_grid(usable(scale), zero_point)

    def learned(self, x: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Quantizer.learned`."""
        if not self.affine:
            return super().learned(x)
        factor, grid = step_gradient_scale(x, self), self.grid()
        step, offset = (scale_gradient(part, factor) for part in (self.step, self.offset))
        return step, offset, 1 / grid.scale, grid.zero_point

    def grid(self) -> Grid:
        """See :meth:`Quantizer.grid`."""
        if not self.affine:
            return super().grid()
        spec, step = self.candidate.spec, self.step.detach()
        zero_point = torch.round(torch.clamp(-self.offset.detach() / step, spec.qmin, spec.qmax))
        return Grid(step, zero_point, spec)

    @torch.no_grad()
    def load_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """See :meth:`Quantizer.load_grid`."""
        self.step.copy_(scale)
        self.floor.copy_(self.step * LEAST)
        if self.affine:
            self.offset.copy_(-zero_point * scale)

    @torch.no_grad()
    def constrain_(self) -> None:
        """See :meth:`LearnedQuantizer.constrain_`."""
        super().constrain_()
        if self.affine:
            # Beyond, the zero point would be clamped and the offset never hear of it again.
            spec = self.candidate.spec
            self.offset.copy_(self.offset.clamp(-spec.qmax * self.step, -spec.qmin * self.step))


def three_deviations(stats: Statistics) -> Tensor:
    """``max(|mean - 3 std|, |mean + 3 std|)``, ``[C]`` fp64."""
    mean = stats.average(lambda values: values)
    variance = stats.average(torch.square) - mean.square()
    return mean.abs() + 3 * variance.clamp(min=0.0).sqrt()

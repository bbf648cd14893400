"""LSQ: the step size is learned (arXiv 1902.08153)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dqss.formula import Formula, scale_gradient
from dqss.functional import channel_count
from dqss.mixing import Grid
from dqss.observers import Statistics
from dqss.quantizers.learned import LEAST, LearnedQuantizer, usable
from dqss.spec import Candidate, QuantSpec, Role


@dataclass(frozen=True)
class LearnedStep(Formula):
    """``round(clamp(x / s, qmin, qmax)) * s`` (eq. 1 and 2), with the vectors s and ``1 / s``.

    Its derivative by s is eq. 3: ``round(x / s) - x / s`` inside, ``qmin`` or ``qmax`` outside. The
    product with ``1 / s`` differs from a division, which takes several times longer, in the last bit at most;
    what learns is rounded so everywhere.
    """

    arity: ClassVar[int] = 2
    learning: ClassVar[int] = 1

    def parts(self, x: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Formula.parts`."""
        step, inverse = vectors
        places = x.detach() * inverse
        clamped = torch.clamp(places, self.qmin, self.qmax)
        inside, codes = places == clamped, torch.round(clamped)
        # The products of eq. 3 written out: no division on the way back.
        carrier = torch.where(inside, x, 0.0) + step * (codes - torch.where(inside, places, 0.0))
        return codes * step.detach(), carrier


class LSQ(LearnedQuantizer):
    """Learned step size of a symmetric grid, signed or unsigned.

    It starts at ``2 <|v|> / sqrt(qmax)``, and its gradient is scaled by ``1 / sqrt(N qmax)`` (section
    2.2), N the values that share a step: of a weight, or of the activations of one image (our
    reading of "features in a layer").
    """

    name: ClassVar[str] = "lsq"

    def __init__(self, candidate: Candidate, channels: int, role: Role) -> None:
        super().__init__(candidate, channels, role)
        self.formula = LearnedStep(candidate.spec.qmin, candidate.spec.qmax)
        self.step = self.parameter()

    @classmethod
    def refusal(cls, spec: QuantSpec, role: Role) -> str | None:
        """See :meth:`LearnedQuantizer.refusal`."""
        if not spec.symmetric:
            return f"has no zero point: use {role.value}_symmetric=true, or lsq_plus"
        return super().refusal(spec, role)

    def start(self, stats: Statistics) -> None:
        """See :meth:`LearnedQuantizer.start`."""
        self.step.copy_(usable(2 * stats.average(torch.abs) / math.sqrt(self.formula.qmax)))
        self.floor.copy_(self.step * LEAST)

    def learned(self, x: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Quantizer.learned`."""
        return scale_gradient(self.step, step_gradient_scale(x, self)), 1 / self.step.detach()

    def grid(self) -> Grid:
        """See :meth:`Quantizer.grid`."""
        return Grid(self.step.detach(), torch.zeros_like(self.step), self.candidate.spec)

    @torch.no_grad()
    def load_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """See :meth:`Quantizer.load_grid`."""
        self.step.copy_(scale)
        self.floor.copy_(self.step * LEAST)

    @torch.no_grad()
    def constrain_(self) -> None:
        """See :meth:`LearnedQuantizer.constrain_`."""
        self.step.clamp_(min=self.floor)


def step_gradient_scale(x: Tensor, quantizer: LearnedQuantizer) -> float:
    """``1 / sqrt(N qmax)`` of a step that quantizes ``x``; see :class:`LSQ`."""
    spec = quantizer.candidate.spec
    images = x.shape[0] if quantizer.role is Role.ACTIVATION and x.ndim else 1
    shared = x.numel() / max(images * channel_count(x.shape, spec.granularity), 1)
    return 1 / math.sqrt(max(shared, 1.0) * spec.qmax)

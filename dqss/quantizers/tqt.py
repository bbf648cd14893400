"""TQT: scales are powers of two, and the logarithm of the threshold is learned (arXiv 1903.08066)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dqss.formula import Formula
from dqss.mixing import Grid
from dqss.observers import Statistics
from dqss.observers.base import power_of_two
from dqss.observers.entropy import Entropy
from dqss.quantizers.learned import LEAST, LearnedQuantizer, usable
from dqss.quantizers.lsq_plus import three_deviations
from dqss.spec import Candidate, QuantSpec, Role


@dataclass(frozen=True)
class RoundedStep(Formula):
    """``clamp(round(x / s), qmin, qmax) * s`` (eq. 4), with the vectors s and ``1 / s``.

    Its derivatives (eq. 6 and 8) are those of a learned step, but what rounds to a code is inside.
    """

    arity: ClassVar[int] = 2
    learning: ClassVar[int] = 1

    def parts(self, x: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Formula.parts`."""
        step, inverse = vectors
        places = x.detach() * inverse
        rounded = torch.round(places)
        codes = torch.clamp(rounded, self.qmin, self.qmax)
        inside = rounded == codes
        carrier = torch.where(inside, x, 0.0) + step * (codes - torch.where(inside, places, 0.0))
        return codes * step.detach(), carrier


class TQT(LearnedQuantizer):
    """Learned threshold t of a symmetric grid: ``s = 2^ceil(log2 t) / 2^(b - 1)``, ``2^b`` if unsigned.

    The derivative of the step by ``log2 t`` is ``s ln 2``, the ceiling passed straight through.
    Weights start at three standard deviations (around the mean, as in LSQ+), activations at the
    threshold of least divergence.
    """

    name: ClassVar[str] = "tqt"
    shifts: ClassVar[bool] = True

    def __init__(self, candidate: Candidate, channels: int, role: Role) -> None:
        super().__init__(candidate, channels, role)
        self.formula = RoundedStep(candidate.spec.qmin, candidate.spec.qmax)
        self.log2_threshold = torch.nn.Parameter(torch.zeros(channels))

    @classmethod
    def refusal(cls, spec: QuantSpec, role: Role) -> str | None:
        """See :meth:`LearnedQuantizer.refusal`."""
        if not spec.symmetric:
            return f"has no zero point: use {role.value}_symmetric=true, or lsq_plus"
        return super().refusal(spec, role)

    @property
    def _places(self) -> int:
        """The step is the power of two at the threshold, shifted right by this."""
        return int(math.log2(self.formula.qmax + 1))

    def start(self, stats: Statistics) -> None:
        """See :meth:`LearnedQuantizer.start`."""
        spec = self.candidate.spec
        clip = three_deviations(stats) if self.role is Role.WEIGHT else Entropy().clip_range(stats, spec)[1]
        self._set(torch.log2(usable(clip)))

    def _set(self, log2_threshold: Tensor) -> None:
        self.log2_threshold.copy_(log2_threshold)
        self.floor.copy_(self.log2_threshold + math.log2(LEAST))

    def learned(self, x: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Quantizer.learned`."""
        level, step = self.log2_threshold, self.grid().scale
        # Exactly the power of two; the derivative comes from a term that is zero.
        return step * (1 + math.log(2) * (level - level.detach())), 1 / step

    def grid(self) -> Grid:
        """See :meth:`Quantizer.grid`."""
        exponent = torch.ceil(self.log2_threshold.detach()) - self._places
        return Grid(power_of_two(exponent), torch.zeros_like(exponent), self.candidate.spec)

    @torch.no_grad()
    def load_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """See :meth:`Quantizer.load_grid`."""
        self._set((torch.frexp(scale).exponent - 1 + self._places).to(torch.float32))

    @torch.no_grad()
    def constrain_(self) -> None:
        """See :meth:`LearnedQuantizer.constrain_`."""
        self.log2_threshold.clamp_(min=self.floor)

"""PACT: the clip of a rectified activation is learned (arXiv 1805.06085)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dqss.formula import Formula
from dqss.mixing import Grid
from dqss.observers import Statistics
from dqss.observers.percentile import Percentile
from dqss.quantizers.learned import LEAST, LearnedQuantizer, usable
from dqss.spec import Candidate, QuantSpec, Role


@dataclass(frozen=True)
class LearnedClip(Formula):
    """Rounding to steps of ``alpha / qmax`` within the grid, with the vectors alpha, step, ``1 / step``.

    The derivative by alpha is that of clipping alone (eq. 3): 1 above the clip, 0 inside, and
    ``qmin / qmax`` below a grid that is signed.
    """

    arity: ClassVar[int] = 3
    learning: ClassVar[int] = 1

    def parts(self, x: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Formula.parts`."""
        high, step, inverse = vectors
        places = x.detach() * inverse
        clamped = torch.clamp(places, self.qmin, self.qmax)
        carrier = torch.where(places == clamped, x, high * (clamped * (1 / self.qmax)))
        return torch.round(clamped) * step, carrier


class LearnedClipQuantizer(LearnedQuantizer):
    """A clip ``alpha`` that is learned, on a grid whose largest code stands for it."""

    def __init__(self, candidate: Candidate, channels: int, role: Role) -> None:
        super().__init__(candidate, channels, role)
        self.formula = LearnedClip(candidate.spec.qmin, candidate.spec.qmax)
        self.alpha = self.parameter()

    def begin_at(self, clip: Tensor) -> None:
        """Set the clip ``[C]``."""
        self.alpha.copy_(usable(clip))
        self.floor.copy_(self.alpha * LEAST)

    def learned(self, x: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Quantizer.learned`."""
        step = self.grid().scale
        return self.alpha, step, 1 / step

    def grid(self) -> Grid:
        """See :meth:`Quantizer.grid`."""
        alpha = self.alpha.detach()
        return Grid(alpha / self.formula.qmax, torch.zeros_like(alpha), self.candidate.spec)

    @torch.no_grad()
    def load_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """See :meth:`Quantizer.load_grid`."""
        self.alpha.copy_(clip_of(scale, self.formula.qmax))
        self.floor.copy_(self.alpha * LEAST)

    @torch.no_grad()
    def constrain_(self) -> None:
        """See :meth:`LearnedQuantizer.constrain_`."""
        self.alpha.clamp_(min=self.floor)


class PACT(LearnedClipQuantizer):
    """Learned clip of an activation; what is below zero becomes zero.

    The paper starts at a constant above all activations and lets L2 decay pull the clip down over a
    whole training. From a trained network and for few epochs it starts, which is our reading,
    where ``p`` percent of the activations are below it.
    """

    name: ClassVar[str] = "pact"
    defaults: ClassVar[Mapping[str, float]] = {"p": 99.9}

    def __init__(self, candidate: Candidate, channels: int, role: Role) -> None:
        super().__init__(candidate, channels, role)
        self.observer = Percentile(self.params["p"])

    @classmethod
    def refusal(cls, spec: QuantSpec, role: Role) -> str | None:
        """See :meth:`LearnedQuantizer.refusal`."""
        if role is not Role.ACTIVATION:
            return "clips activations: use lsq or dorefa"
        if not spec.symmetric or spec.signed:
            return "clips at zero: use activation_symmetric=true and activation_signed=false, or lsq, pams"
        return super().refusal(spec, role)

    def start(self, stats: Statistics) -> None:
        """See :meth:`LearnedQuantizer.start`."""
        self.begin_at(self.observer.clip_range(stats, self.candidate.spec)[1])


def clip_of(scale: Tensor, qmax: int) -> Tensor:
    """The fp32 clip whose division by ``qmax`` gave ``scale``, to the bit."""
    near = scale * qmax
    infinity = torch.full_like(near, torch.inf)
    for other in (torch.nextafter(near, infinity), torch.nextafter(near, -infinity)):
        near = torch.where(near / qmax == scale, near, other)
    return near

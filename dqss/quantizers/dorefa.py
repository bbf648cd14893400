"""DoReFa: weights through a tanh, activations clipped at a constant (arXiv 1606.06160)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dqss.formula import FixedGrid, Formula, scale_gradient
from dqss.functional import channel_view
from dqss.mixing import Grid
from dqss.observers import Statistics
from dqss.observers.mse import MSE
from dqss.quantizers.learned import LEAST, LearnedQuantizer, usable
from dqss.quantizers.lsq import step_gradient_scale
from dqss.spec import MIDDLE, Candidate, QuantSpec, Role

_SMALLEST = 2.0**-100  # a weight of all zeros has a slope, too


@dataclass(frozen=True)
class TanhWeights(Formula):
    """``(r - n / 2) s`` with ``r = round(n (tanh(x) / m + 1) / 2)`` and ``n = 2^b - 1``.

    m is the largest ``|tanh(x)|``; the vectors are s and ``n / (2 m)``. That is eq. 9 times a gain,
    ``s n / 2``: codes from ``qmin`` on with the zero point -1/2, so that the grid has as many values
    above zero as below, and no zero.
    """

    arity: ClassVar[int] = 2
    learning: ClassVar[int] = 1

    def slope(self, largest: Tensor) -> Tensor:
        """``n / (2 m)`` from the largest ``|x|``: tanh is monotonic."""
        return (self.qmax - self.qmin) / (2 * torch.tanh(largest).clamp(min=_SMALLEST))

    def parts(self, x: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Formula.parts`."""
        step, slope = vectors
        steps = self.qmax - self.qmin
        place = torch.tanh(x) * slope + steps / 2
        codes = torch.round(torch.clamp(place.detach(), 0, steps)) - steps / 2
        return codes * step.detach(), place * step.detach() + codes * step


class DoReFa(LearnedQuantizer):
    """Weights through a tanh, with a learned gain; activations with a clip that does not learn.

    Our readings, since the paper trains from scratch and lets batch norms make up for magnitudes,
    where we start from a trained network. Weights, which the paper scales to [-1, 1], have a gain,
    which starts at the least squared error and learns (its gradient scaled as LSQ's); their largest
    magnitude is a constant on the way back, or one weight would have the gradient of all. Activations,
    which the paper clips at 1, are clipped where the squared error over the calibration inputs is least.
    """

    name: ClassVar[str] = "dorefa"

    def __init__(self, candidate: Candidate, channels: int, role: Role) -> None:
        super().__init__(candidate, channels, role)
        spec = candidate.spec
        self.fixed, self.shaped = FixedGrid.of(spec), TanhWeights(spec.qmin, spec.qmax)
        self.formula: Formula = self.shaped if role is Role.WEIGHT else self.fixed
        if role is Role.WEIGHT:
            self.step = self.parameter()
        else:
            self.register_buffer("step", torch.ones(channels))

    @classmethod
    def refusal(cls, spec: QuantSpec, role: Role) -> str | None:
        """See :meth:`LearnedQuantizer.refusal`."""
        if role is Role.WEIGHT and not spec.mirrored:
            return "quantizes weights around zero: use weight_symmetric=true"
        if role is Role.ACTIVATION and (not spec.symmetric or spec.signed):
            return "clips activations at zero: use activation_symmetric=true and activation_signed=false"
        return super().refusal(spec, role)

    def start(self, stats: Statistics) -> None:
        """See :meth:`LearnedQuantizer.start`."""
        step = self._best_gain(stats) if self.role is Role.WEIGHT else MSE().solve(stats, self.grid().spec)[0]
        self.load_grid(usable(step), torch.zeros_like(step))

    def _best_gain(self, stats: Statistics) -> Tensor:
        """The step with the least squared error, ``[C]`` fp64: ``<v, q> / <q, q>``."""
        slope = self.shaped.slope(torch.maximum(stats.minimum.abs(), stats.maximum.abs()))
        unit = torch.ones_like(slope)[:, None]
        places = self.shaped.parts(stats.values, unit, slope[:, None])[0].double()
        counts = stats.counts.double()
        return (stats.values.double() * places * counts).sum(1) / (places.square() * counts).sum(1)

    def learned(self, x: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Quantizer.learned`."""
        if self.role is Role.ACTIVATION:
            return self.fixed.vectors(self.step, torch.zeros_like(self.step))
        rows = channel_view(x.detach(), self.candidate.spec.granularity)
        slope = self.shaped.slope(rows.abs().amax(1).to(torch.float32))
        return scale_gradient(self.step, step_gradient_scale(x, self)), slope

    def grid(self) -> Grid:
        """See :meth:`Quantizer.grid`."""
        zero_point = MIDDLE if self.role is Role.WEIGHT else 0.0
        return Grid(self.step.detach(), torch.full_like(self.step, zero_point), self.candidate.spec)

    @torch.no_grad()
    def load_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """See :meth:`Quantizer.load_grid`; the zero point is always the same."""
        self.step.copy_(scale)
        self.floor.copy_(self.step * LEAST)

    @torch.no_grad()
    def constrain_(self) -> None:
        """See :meth:`LearnedQuantizer.constrain_`."""
        self.step.clamp_(min=self.floor)

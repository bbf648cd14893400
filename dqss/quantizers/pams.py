"""PAMS: the largest magnitude of an activation is learned (arXiv 2011.04212)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from dqss.observers import Statistics
from dqss.observers.moving_average import MovingAverage
from dqss.quantizers.lsq import LearnedStep
from dqss.quantizers.pact import LearnedClipQuantizer
from dqss.spec import Candidate, QuantSpec, Role


class PAMS(LearnedClipQuantizer):
    """Learned largest magnitude alpha on a signed symmetric grid with steps of ``alpha / qmax``.

    Made for super-resolution, whose activations are two-sided. The gradient of alpha passes through
    clipping and rescaling, so that inside it is a learned step's. It starts at a moving average of the
    batches' largest magnitudes. The grid's lowest code, which the paper leaves out, is used.
    """

    name: ClassVar[str] = "pams"
    defaults: ClassVar[Mapping[str, float]] = {"momentum": 0.9}
    needs_batches = True

    def __init__(self, candidate: Candidate, channels: int, role: Role) -> None:
        super().__init__(candidate, channels, role)
        self.formula = LearnedStep(candidate.spec.qmin, candidate.spec.qmax)
        self.observer = MovingAverage(self.params["momentum"])

    @classmethod
    def refusal(cls, spec: QuantSpec, role: Role) -> str | None:
        """See :meth:`LearnedQuantizer.refusal`."""
        if role is not Role.ACTIVATION:
            return "quantizes activations: use lsq or dorefa"
        if not spec.mirrored:
            return "is symmetric: use activation_symmetric=true and activation_signed=true, or lsq, pact"
        return super().refusal(spec, role)

    def start(self, stats: Statistics) -> None:
        """See :meth:`LearnedQuantizer.start`."""
        self.begin_at(self.observer.clip_range(stats, self.candidate.spec)[1])

    def learned(self, x: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`Quantizer.learned`."""
        step = self.alpha / self.formula.qmax
        return step, 1 / step.detach()

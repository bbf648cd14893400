"""Mixed quantizers whose parameters learn, on weights that learn: what QAT puts in the supernet."""

from __future__ import annotations

from torch import Tensor

from dqss.learning import mix_learned
from dqss.mixed import Found, MixedActivation, MixedQuantizer, MixedWeight, Mode
from dqss.quantizers import LearnedQuantizer


class _Learning(MixedQuantizer):
    """Runs the mixture of candidates that learn, or one of them by itself.

    Attributes:
        compensate: divide what a candidate's parameters learn by its probability, with which the
            mixture has multiplied it.
    """

    compensate = False

    def outcome(self) -> list[int]:
        """See :meth:`MixedQuantizer.outcome`: what is the same now will not stay so."""
        return list(range(len(self.candidates)))

    def learned_mixture(self, x: Tensor) -> Tensor:
        """The mixture as it stands; of one option alone only that one is computed."""
        if self.alone:
            found: Tensor = self[self.decision.choice](x)
            return found
        quantizers = [self[k] for k in range(len(self.candidates))]
        return mix_learned(x, self.decision.weights(), quantizers, self.compensate, self.decision.place())

    def constrain(self) -> list[str]:
        """After a step of the optimizer: keep parameters valid; the candidates that are beyond help."""
        learned = [q for q in self.candidates if isinstance(q, LearnedQuantizer)]
        for quantizer in learned:
            quantizer.constrain_()
        return [quantizer.candidate.label for quantizer in learned if quantizer.broken()]


class TrainedActivation(_Learning, MixedActivation):
    """Mixture of learned quantizations of a layer's input."""

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` as the mode says; integers pass through."""
        if self.mode in (Mode.RELAXED, Mode.DISCRETE) and x.is_floating_point():
            self.calls += 1
            return self.learned_mixture(x)
        return super().forward(x)


class TrainedWeight(_Learning, MixedWeight):
    """Mixture of learned quantizations of a weight that learns too; used as its parametrization."""

    def settle(self, found: Found) -> None:
        """See :meth:`MixedQuantizer.settle`: nothing is frozen, no codes are kept."""
        self._importance = None

    @property
    def bytes(self) -> int:
        """No codes are kept."""
        return 0

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer multiplies with, as the mode says."""
        if self.mode in (Mode.RELAXED, Mode.DISCRETE):
            self.calls += 1
            return self.learned_mixture(weight)
        return super().forward(weight)

"""Which parameters a step of QAT search moves, and on which data: all at once, or in turn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn

from dqss.errors import UserError
from dqss.lit.training_data import StepPlan
from dqss.samples import split
from dqss.trainable import Learnable


class Update(ABC):
    """How the steps of a search share the data and the parameters."""

    @abstractmethod
    def plans(self, count: int, batch_size: int, seed: int) -> list[StepPlan]:
        """What is read in turn, a step each, of ``count`` items."""

    @abstractmethod
    def learning(self, learnable: Learnable, step: int) -> list[nn.Parameter]:
        """What gets gradients in ``step``."""


@dataclass(frozen=True)
class SinglePass(Update):
    """Weights, quantizer parameters and logits from one loss in one pass over all data (arXiv 2404.08010)."""

    def plans(self, count: int, batch_size: int, seed: int) -> list[StepPlan]:
        """See :meth:`Update.plans`."""
        return [StepPlan(range(count), batch_size, seed)]

    def learning(self, learnable: Learnable, step: int) -> list[nn.Parameter]:
        """See :meth:`Update.learning`."""
        return [*learnable.weights, *learnable.quantizers, *learnable.logits]


@dataclass(frozen=True)
class Bilevel(Update):
    """First-order DARTS (arXiv 1806.09055), to compare with: logits and weights in turn.

    Each has data of its own. A step of one and a step of the other count as two.

    Attributes:
        share: of the data for the logits.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"method.update.share={self.share}: expected a share between 0 and 1")

    def plans(self, count: int, batch_size: int, seed: int) -> list[StepPlan]:
        """See :meth:`Update.plans`."""
        weights, logits = split(count, [1 - self.share, self.share], seed)
        return [StepPlan(weights, batch_size, seed), StepPlan(logits, batch_size, seed + 1)]

    def learning(self, learnable: Learnable, step: int) -> list[nn.Parameter]:
        """See :meth:`Update.learning`."""
        return learnable.logits if step % 2 else [*learnable.weights, *learnable.quantizers]

"""How the relaxation changes over the steps of a search."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from dqss.decision import Relaxation, Softmax, StraightThroughGumbel
from dqss.errors import UserError


class Schedule(ABC):
    """The relaxation and the weight of the entropy penalty as functions of progress in [0, 1]."""

    @abstractmethod
    def relaxation(self, progress: float) -> Relaxation:
        """What the decisions use."""

    def entropy_weight(self, progress: float) -> float:
        """Weight of the mean entropy (nats) of the decisions in the loss."""
        return 0.0


@dataclass(frozen=True)
class SoftmaxSchedule(Schedule):
    """Softmax mixtures, optionally cooled, optionally pressed towards certainty late.

    Attributes:
        temperature, final_temperature: first and last; geometric in between.
        entropy: weight of the mean entropy at the end; it grows linearly ...
        entropy_delay: ... from this fraction of the steps on.
    """

    temperature: float = 1.0
    final_temperature: float = 1.0
    entropy: float = 0.0
    entropy_delay: float = 0.5

    def __post_init__(self) -> None:
        _check_temperatures(self.temperature, self.final_temperature)
        if not 0 <= self.entropy_delay <= 1:
            raise UserError(f"schedule.entropy_delay={self.entropy_delay}: expected a number in 0..1")

    def relaxation(self, progress: float) -> Relaxation:
        """See :meth:`Schedule.relaxation`."""
        return Softmax(_geometric(self.temperature, self.final_temperature, progress))

    def entropy_weight(self, progress: float) -> float:
        """See :meth:`Schedule.entropy_weight`."""
        if progress <= self.entropy_delay:
            return 0.0
        return self.entropy * (progress - self.entropy_delay) / (1.0 - self.entropy_delay)


@dataclass(frozen=True)
class GumbelSchedule(Schedule):
    """One sampled candidate a decision and step, with straight-through gradients.

    Attributes:
        temperature, final_temperature: of the soft sample behind the gradient; geometric.
    """

    temperature: float = 1.0
    final_temperature: float = 0.5

    def __post_init__(self) -> None:
        _check_temperatures(self.temperature, self.final_temperature)

    def relaxation(self, progress: float) -> Relaxation:
        """See :meth:`Schedule.relaxation`."""
        return StraightThroughGumbel(_geometric(self.temperature, self.final_temperature, progress))


def _check_temperatures(*temperatures: float) -> None:
    if not all(0 < value < math.inf for value in temperatures):
        raise UserError(f"schedule: temperatures {list(temperatures)}: expected positive numbers")


def _geometric(start: float, end: float, progress: float) -> float:
    return float(start * (end / start) ** progress)

"""How a search relaxes its decisions, and what moves their logits, over its steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dqss.budget.steer import Steering
from dqss.checks import check_least
from dqss.decision import Decision, Relaxation, Sampled, Softmax, StraightThroughGumbel
from dqss.errors import UserError
from dqss.lit.mean_field import MeanField

SHORTEST_MEMORY = 0.1
"""With less, options that were not drawn for long would have next to no weight in the fit."""

HIGHEST = 0.999
"""Share of ``log K``: at 1 the temperature would be infinite."""

LARGEST_REHEAT = 0.25
"""Share of a search that may go to its reheats: the fall before them must be slow."""


class Schedule(ABC):
    """Relaxation, entropy penalty and optimizer of a search of so many steps.

    Progress is in [0, 1].
    """

    @abstractmethod
    def relaxation(self, progress: float) -> Relaxation:
        """What the decisions use."""

    def entropy_weight(self, progress: float) -> float:
        """Weight of the mean entropy (nats) of the decisions in the loss."""
        return 0.0

    def cold(self, steps: int) -> list[int]:
        """Numbers of steps after which the argmax is worth measuring; the last is ``steps``."""
        return [steps]

    prices_effects: ClassVar[bool] = False
    """Whether its optimizer adds the costs of options to their effects, so that the loss need not."""

    @property
    def informed_entropy(self) -> float | None:
        """Share of ``log K`` to begin from where effects have been estimated; None: they are of no use."""
        return None

    def optimizer(
        self,
        decisions: Sequence[Decision],
        steps: int,
        learning_rate: float,
        steering: Steering | None = None,
        shown: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """What moves the logits, in the words of Lightning: Adam, its rate falling linearly to 0.

        Sampled gradients are noisy: with a constant rate the last few steps would decide. Limits come
        in by the loss. What uniform strategies have ``shown`` (:func:`dqss.uniform.shown_effects`) is
        used by the mean field alone.
        """
        logits = [decision.logits for decision in decisions]
        adam = torch.optim.Adam(logits, lr=learning_rate, betas=(0.9, 0.99))
        decay = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: max(0.0, 1.0 - step / steps))
        return {"optimizer": adam, "lr_scheduler": {"scheduler": decay, "interval": "step"}}


@dataclass(frozen=True)
class MeanFieldSchedule(Schedule):
    """Sampled options; logits follow their measured effects, at a falling entropy.

    The entropy falls slowly once, and then a few times more from a lower one: each time the search
    settles in a slightly other strategy, and the best of them, measured, is taken. With a budget the
    effects have been estimated before, and the first fall begins from ``reheat_entropy`` too. See
    :class:`dqss.lit.mean_field.MeanField`; a learning rate is not used. Not of the paper: our own
    way; ``experiments/cifar_resnet20`` compares it with the others.

    Attributes:
        entropy, final_entropy: mean entropy of the decisions after the first step and when it has
            fallen, as a share of ``log K``; linear in between.
        shown_entropy: the first of them, where uniform strategies have shown what is clearly bad.
        memory: how long a step counts, as a share of all steps: what earlier steps have taught
            is multiplied by ``1 - 1 / (memory steps)`` each step ...
        longest_memory: ... or by ``1 - 1 / longest_memory`` if that is less.
        reheats: how often it falls again ...
        reheat_entropy: ... from this share of ``log K`` ...
        reheat_steps: ... in so many steps each time. Not at all in searches so short that this
            would take more than a quarter of their steps.
    """

    entropy: float = 1.0
    final_entropy: float = 0.05
    shown_entropy: float = 0.5
    memory: float = 0.67
    longest_memory: int = 360
    reheats: int = 3
    reheat_entropy: float = 0.3
    reheat_steps: int = 100
    prices_effects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("entropy", "final_entropy", "shown_entropy", "reheat_entropy"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise UserError(f"schedule.{name}={value}: expected a share in 0..1, above 0")
        if not SHORTEST_MEMORY <= self.memory < math.inf:
            raise UserError(
                f"schedule.memory={self.memory}: expected a share of the steps, {SHORTEST_MEMORY} or more"
            )
        check_least(self, "schedule", 0, "reheats")
        check_least(self, "schedule", 1, "longest_memory", "reheat_steps")

    def relaxation(self, progress: float) -> Relaxation:
        """See :meth:`Schedule.relaxation`."""
        return Sampled()

    @property
    def informed_entropy(self) -> float:
        """See :attr:`Schedule.informed_entropy`."""
        return min(self.entropy, self.reheat_entropy, HIGHEST)

    def optimizer(
        self,
        decisions: Sequence[Decision],
        steps: int,
        learning_rate: float,
        steering: Steering | None = None,
        shown: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """See :meth:`Schedule.optimizer`."""
        first_entropy = self.entropy if shown is None else min(self.entropy, self.shown_entropy)
        falls = self._falls(steps, first_entropy)
        if steering is not None and steering.estimates is not None:
            falls = [(first, last, min(entropy, self.informed_entropy)) for first, last, entropy in falls]

        def wanted(done: int) -> float:
            first, last, entropy = next(fall for fall in falls if done < fall[1] or fall is falls[-1])
            share = entropy + (self.final_entropy - entropy) * min(1.0, (done - first) / (last - first))
            return min(max(share, 1e-3), HIGHEST)  # at 0 and 1 the temperature would be 0 and infinite

        memory = min(self.memory * steps, self.longest_memory)
        return {"optimizer": MeanField(decisions, wanted, 1.0 - min(1.0, 1.0 / memory), steering, shown)}

    def cold(self, steps: int) -> list[int]:
        """See :meth:`Schedule.cold`: where the entropy has fallen."""
        return [last for _, last, _ in self._falls(steps, self.entropy)]

    def _falls(self, steps: int, entropy: float) -> list[tuple[int, int, float]]:
        """First step, last step and entropy to begin with, each time that the entropy falls."""
        reheats = self.reheats if self.reheats * self.reheat_steps <= LARGEST_REHEAT * steps else 0
        begin, length = steps - reheats * self.reheat_steps, self.reheat_steps
        again = [(first, first + length, self.reheat_entropy) for first in range(begin, steps, length)]
        return [(0, begin, entropy), *again]


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

"""Stages of a training: how long each is, its learning rates, and what its loss is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Stages:
    """Every stage has the same schedule, from its beginning: rates rise, then fall with a cosine.

    RLFN's multi-stage warm start (arXiv 2205.07514); its rates fall by halves.

    Attributes:
        steps: of each stage.
        contrastive: weight of the contrastive loss in each.
        learning_rate: at its highest.
        ramp: share of a stage in which the rate rises.
    """

    steps: Sequence[int]
    contrastive: Sequence[float]
    learning_rate: float
    ramp: float = 0.05

    @property
    def total(self) -> int:
        """Steps in all."""
        return sum(self.steps)

    @property
    def starts(self) -> list[int]:
        """The first step of each stage."""
        return [0, *accumulate(self.steps[:-1])]

    def number_at(self, step: int) -> int:
        """Which stage, from 0 on; the last one beyond the end."""
        return sum(step >= start for start in self.starts) - 1

    def contrastive_at(self, step: int) -> float:
        """Weight of the contrastive loss."""
        return self.contrastive[self.number_at(step)]

    def rate_at(self, step: int) -> float:
        """The learning rate."""
        number = self.number_at(step)
        done, length = step - self.starts[number], self.steps[number]
        rise = min(1.0, (done + 1) / max(self.ramp * length, 1.0))
        return self.learning_rate * rise * 0.5 * (1.0 + math.cos(math.pi * min(done / length, 1.0)))

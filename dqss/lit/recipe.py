"""What ``python -m dqss.train`` asks of a way to train, whatever the network is for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dqss.data.base import CalibrationDataModule
from dqss.progress import Reporter


@dataclass(frozen=True)
class TrainingRun:
    """Where and how a training runs.

    Attributes:
        folder: takes checkpoints and the course; a training goes on from what is there.
        seed: of batch order and augmentation.
        trainer: arguments of :class:`pytorch_lightning.Trainer`.
        reporter: progress and the wish to stop.
    """

    folder: Path
    seed: int
    trainer: Mapping[str, Any]
    reporter: Reporter


@dataclass(frozen=True)
class Trained:
    """What a training leaves.

    Attributes:
        module: whose weights are written, in eval mode.
        score: on the validation data, more is better; not a number where there are none.
        words: the same for people.
    """

    module: nn.Module
    score: float
    words: str


class Recipe(ABC):
    """A way to train a network."""

    @abstractmethod
    def check(self, data: CalibrationDataModule) -> None:
        """Refuse data that this way is not for, before anything is read.

        Raises:
            DataError: naming what would do.
        """

    @abstractmethod
    def train(self, module: nn.Module, data: CalibrationDataModule, run: TrainingRun) -> Trained:
        """Train ``module`` in place.

        Raises:
            UserError: for networks and data that do not fit, and losses that are not finite.
        """

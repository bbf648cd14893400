"""What all modules that are trained step by step share with what keeps them safe."""

from __future__ import annotations

from abc import ABC, abstractmethod

import pytorch_lightning as pl

HistoryRow = dict[str, float]


class SteppedModule(pl.LightningModule, ABC):
    """A module with a known number of steps and a history of them.

    Attributes:
        history: a row for each step that is written down.
    """

    def __init__(self) -> None:
        super().__init__()
        self.history: list[HistoryRow] = []

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps of the optimizer in all."""

    @property
    def finished(self) -> bool:
        """Whether further steps would change nothing, as far as one may tell."""
        return False

    @property
    def between_steps(self) -> bool:
        """Whether the last batch ended a step of the optimizer, so that its state can be kept."""
        return True

    def log_row(self, row: HistoryRow) -> None:
        """Hand a row of the history to the loggers."""
        values = {f"search/{key}": value for key, value in row.items() if key != "step"}
        for logger in self.loggers:
            logger.log_metrics(values, step=int(row["step"]))

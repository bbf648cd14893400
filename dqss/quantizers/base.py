"""What every quantizer module offers to the supernet, to ``apply`` and to export."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dqss.formula import Formula
from dqss.mixing import Codes, Grid
from dqss.observers import Statistics
from dqss.precision import KeepsPrecision
from dqss.spec import Candidate


class Quantizer(KeepsPrecision, ABC):
    """Quantize-dequantize of one tensor by one candidate.

    Attributes:
        candidate: what it is.
        channels: how many scales it has.
        formula: what it computes in training, of the tensor and of :meth:`learned`.
    """

    formula: Formula
    needs_gradients = False
    """Whether :meth:`calibrate` makes use of ``Statistics.importance``."""
    needs_batches = False
    """Whether :meth:`calibrate` makes use of ``Statistics.batches``."""

    needs_inputs = False
    """Whether weights are rounded to fit the inputs of their layer, see :mod:`dqss.fitting`."""

    def __init__(self, candidate: Candidate, channels: int) -> None:
        super().__init__()
        self.candidate = candidate
        self.channels = channels

    @abstractmethod
    def calibrate(self, stats: Statistics) -> None:
        """Set the parameters from statistics of C channels."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize ``x``; shape and type stay."""

    @abstractmethod
    def learned(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the formula takes beside ``x``, the tensor at hand: ``[C]`` fp32 each."""

    @abstractmethod
    def grid(self) -> Grid:
        """The grid as it stands."""

    @abstractmethod
    def load_grid(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take the parameters of which :meth:`grid` made ``scale`` and ``zero_point``, ``[C]``."""

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Codes:
        """Integer codes of ``weight``, with the grid that turns them back."""
        grid = self.grid()
        return Codes.of(weight, Grid(grid.scale.clone(), grid.zero_point.clone(), grid.spec))

    def extra_repr(self) -> str:
        """The candidate's label, for ``print(model)``."""
        return self.candidate.label

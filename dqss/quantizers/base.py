"""What every quantizer module offers to the supernet, to ``apply`` and to export."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dqss.mixing import Codes, Grid
from dqss.observers import Statistics
from dqss.precision import KeepsPrecision
from dqss.spec import Candidate


class Quantizer(KeepsPrecision, ABC):
    """Quantize-dequantize of one tensor by one candidate.

    Attributes:
        candidate: what it is.
        scale, zero_point: ``[C]`` fp32, of their final shape from the start.
    """

    scale: Tensor
    zero_point: Tensor
    needs_gradients = False
    """Whether :meth:`calibrate` makes use of ``Statistics.importance``."""
    needs_batches = False
    """Whether :meth:`calibrate` makes use of ``Statistics.batches``."""

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

    def grid(self) -> Grid:
        """The grid as it stands."""
        return Grid(self.scale, self.zero_point, self.candidate.spec)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Codes:
        """Integer codes of ``weight``, with the grid that turns them back."""
        grid = Grid(self.scale.clone(), self.zero_point.clone(), self.candidate.spec)
        return Codes.of(weight, grid)

    def extra_repr(self) -> str:
        """The candidate's label, for ``print(model)``."""
        return self.candidate.label

"""What every quantizer module offers to the supernet, to ``apply`` and to export."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dqss.functional import broadcast_channels, quantize
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

    def grid(self, ndim: int) -> Grid:
        """The grid, shaped for an ``ndim``-dimensional tensor."""
        granularity = self.candidate.spec.granularity
        return Grid(
            broadcast_channels(self.scale, ndim, granularity),
            broadcast_channels(self.zero_point, ndim, granularity),
            self.candidate.spec,
        )

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Codes:
        """Integer codes of ``weight``, with the parameters that turn them back."""
        grid = self.grid(weight.ndim)
        integers = quantize(weight.to(torch.float32), grid.scale, grid.zero_point, grid.spec)
        return Codes.pack(integers, grid.scale, grid.zero_point, grid.spec)

    def extra_repr(self) -> str:
        """The candidate's label, for ``print(model)``."""
        return self.candidate.label

"""Moving average: extremes that follow the batches, so that one odd batch does not decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dqss.errors import SearchSpaceError
from dqss.observers.base import Algorithm, Statistics, bounded_range, full_range
from dqss.spec import QuantSpec


@dataclass(frozen=True)
class MovingAverage(Algorithm):
    """Clip at an exponential moving average of each batch's extremes (arXiv 1712.05877, section 3.1).

    ``average = momentum * average + (1 - momentum) * batch``, from the first batch on. A tensor
    that comes in one batch, such as a weight, gets min-max. Other than any other algorithm's,
    its result depends on how the calibration inputs were cut into batches.

    Raises:
        SearchSpaceError: when ``momentum`` is not in [0, 1).
    """

    momentum: float = 0.9
    name: ClassVar[str] = "moving_average"
    needs_batches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise SearchSpaceError(f"moving_average: momentum={self.momentum:g} is not in [0, 1)")

    def clip_range(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """See :meth:`Algorithm.clip_range`."""
        if stats.batches is None:
            return full_range(stats, spec)
        low, high = self._average(stats.batches.minima), self._average(stats.batches.maxima)
        if spec.mirrored:
            high = (-low).maximum(high)
            low = -high
        return bounded_range(low, high, stats, spec)

    def _average(self, batches: Tensor) -> Tensor:
        """Of ``[B, C]``, ``[C]`` fp64."""
        average = batches[0].double()
        for batch in batches[1:].double():
            average = self.momentum * average + (1 - self.momentum) * batch
        return average

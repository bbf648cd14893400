"""Min-max: the whole range, nothing clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dqss.observers.base import Algorithm, Statistics, full_range
from dqss.spec import QuantSpec


@dataclass(frozen=True)
class MinMax(Algorithm):
    """Clip at the extremes that were seen."""

    name: ClassVar[str] = "minmax"

    def clip_range(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """See :meth:`Algorithm.clip_range`."""
        return full_range(stats, spec)

"""MSE: the clip range with the least squared quantization error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dqss.observers.base import Algorithm, Statistics
from dqss.observers.clip_search import search_clip
from dqss.spec import QuantSpec


@dataclass(frozen=True)
class MSE(Algorithm):
    """Minimize the sum of squares of ``fake_quantize(x) - x`` over the clip range."""

    name: ClassVar[str] = "mse"

    def clip_range(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """See :meth:`Algorithm.clip_range`."""
        return search_clip(stats, spec, 2.0)

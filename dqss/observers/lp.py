"""Lp: the clip range with the least sum of powers of the quantization error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dqss.errors import SearchSpaceError
from dqss.observers.base import Algorithm, Statistics
from dqss.observers.clip_search import search_clip
from dqss.spec import QuantSpec


@dataclass(frozen=True)
class Lp(Algorithm):
    """Minimize the sum of ``|fake_quantize(x) - x| ** p`` over the clip range.

    Above 2, clipping weighs more than rounding, below 2 less (Lp norms as a criterion: arXiv 1911.07190).

    Raises:
        SearchSpaceError: when ``p`` is not in (0, 10].
    """

    p: float = 2.4
    name: ClassVar[str] = "lp"

    def __post_init__(self) -> None:
        if not 0 < self.p <= 10:
            raise SearchSpaceError(f"lp: p={self.p:g} is not an exponent in (0, 10]")

    def clip_range(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """See :meth:`Algorithm.clip_range`."""
        return search_clip(stats, spec, self.p)

"""Percentile: clip so that a given share of the values stays inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dqss.errors import SearchSpaceError
from dqss.observers.base import Algorithm, Statistics, bounded_range, running_sum
from dqss.spec import QuantSpec

_ROUNDING = 1e-12  # relative: p / 100 * n may land just above the integer that it means


@dataclass(frozen=True)
class Percentile(Algorithm):
    """Keep ``p`` percent of the values inside the clip range.

    Signed symmetric grids clip at the p-th percentile of ``|x|``. The others cut half of what is
    left over at each end, or all of it at the only end of one-sided data. Percentiles are inverted
    cumulative distributions, with no interpolation: the smallest value that at least p percent
    of the values do not exceed; the lower end is the same rule applied to ``-x``.

    Raises:
        SearchSpaceError: when ``p`` is not in (0, 100].
    """

    p: float = 99.99
    name: ClassVar[str] = "percentile"

    def __post_init__(self) -> None:
        if not 0 < self.p <= 100:
            raise SearchSpaceError(f"percentile: p={self.p:g} is not a percentage in (0, 100]")

    def clip_range(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """See :meth:`Algorithm.clip_range`."""
        inside = torch.full_like(stats.minimum, self.p / 100, dtype=torch.float64)
        if spec.mirrored:
            magnitudes, order = stats.values.abs().sort(dim=1, stable=True)
            high = weighted_quantile(magnitudes, stats.counts.gather(1, order), inside)
            return bounded_range(-high, high, stats, spec)
        two_sided = (stats.minimum < 0) & (stats.maximum > 0)
        share = torch.where(two_sided, (1 + inside) / 2, inside)
        high = weighted_quantile(stats.values, stats.counts, share)
        low = -weighted_quantile(-stats.values.flip(1), stats.counts.flip(1), share)
        return bounded_range(low, high, stats, spec)


def weighted_quantile(values: Tensor, counts: Tensor, share: Tensor) -> Tensor:
    """Smallest value whose cumulative count reaches ``share`` of the total.

    Args:
        values: ``[C, n]``, ascending along n.
        counts: ``[C, n]``, not negative.
        share: ``[C]`` fp64, in (0, 1].

    Returns:
        ``[C]``.
    """
    reached = running_sum(counts)[:, 1:].contiguous()
    target = share * reached[:, -1] * (1 - _ROUNDING)
    index = torch.searchsorted(reached, target[:, None]).clamp(max=values.shape[1] - 1)
    return values.gather(1, index)[:, 0]

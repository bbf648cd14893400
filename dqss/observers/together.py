"""Many small tensors calibrated at once: their channels side by side, as if they were one tensor."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dqss.observers.base import Algorithm, BatchExtremes, Statistics
from dqss.spec import QuantSpec

_TOGETHER = 1 << 20
"""Values calibrated at once at most. What is larger takes long by itself, and much memory in copies."""


@dataclass(frozen=True)
class Problem:
    """A tensor to calibrate.

    Attributes:
        algorithm: by which rule.
        stats: what is known of it.
        spec: for which grid.
    """

    algorithm: Algorithm
    stats: Statistics
    spec: QuantSpec

    def kind(self) -> Hashable:
        """Equal for those that can be calibrated side by side."""
        stats = self.stats
        batches = None if stats.batches is None else len(stats.batches.minima)
        known = (stats.width is None, stats.importance is None, batches)
        return self.algorithm, self.spec, stats.values.shape[1], known, stats.values.device


def solve_together(problems: Sequence[Problem]) -> list[tuple[Tensor, Tensor]]:
    """``(scale, zero_point)`` of each, as :meth:`Algorithm.qparams` gives them one by one.

    Rules look at each channel by itself, so channels of several tensors may stand side by side.
    """
    solved: list[tuple[Tensor, Tensor] | None] = [None] * len(problems)
    for places in _groups(problems):
        first = problems[places[0]]
        stats = side_by_side([problems[place].stats for place in places])
        scales, zero_points = first.algorithm.qparams(stats, first.spec)
        sizes = [len(problems[place].stats.minimum) for place in places]
        parts = (torch.split(part, sizes) for part in (scales, zero_points))
        for place, scale, zero_point in zip(places, *parts, strict=True):
            solved[place] = (scale.clone(), zero_point.clone())
    return [one for one in solved if one is not None]


def _groups(problems: Sequence[Problem]) -> list[list[int]]:
    """Positions of what is calibrated at once, each group in order."""
    groups: list[list[int]] = []
    open_groups: dict[Hashable, tuple[list[int], int]] = {}
    for place, problem in enumerate(problems):
        kind, size = problem.kind(), problem.stats.values.numel()
        group, before = open_groups.get(kind, ([], _TOGETHER))
        if before + size > _TOGETHER:
            group, before = [], 0
            groups.append(group)
        group.append(place)
        open_groups[kind] = group, before + size
    return groups


def side_by_side(several: Sequence[Statistics]) -> Statistics:
    """All channels of statistics that hold equally many values, and know the same of them."""
    if len(several) == 1:
        return several[0]
    first = several[0]
    batches = None
    if first.batches is not None:
        known = [stats.batches for stats in several if stats.batches is not None]
        batches = BatchExtremes(
            torch.cat([one.minima for one in known], dim=1), torch.cat([one.maxima for one in known], dim=1)
        )
    return Statistics(
        torch.cat([stats.values for stats in several]),
        torch.cat([stats.counts for stats in several]),
        torch.cat([stats.minimum for stats in several]),
        torch.cat([stats.maximum for stats in several]),
        None if first.width is None else torch.cat([s.width for s in several if s.width is not None]),
        None
        if first.importance is None
        else torch.cat([s.importance for s in several if s.importance is not None]),
        batches,
    )

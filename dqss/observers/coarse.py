"""A tensor's distribution for people to look at: few bins, all channels together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dqss.observers.base import Statistics

BINS = 128


@dataclass(frozen=True)
class CoarseHistogram:
    """Equal bins from the smallest to the largest value, all channels together.

    Attributes:
        low, high: smallest and largest value.
        counts: of each bin.
        zeros: how many of the values are exactly zero; they are in ``counts`` too.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    zeros: int

    @classmethod
    def of_values(cls, values: Tensor, bins: int = BINS) -> CoarseHistogram:
        """Of the values of any tensor that is not empty, each counted once."""
        flat = values.detach().reshape(-1).float()
        low, high = (float(extreme) for extreme in torch.aminmax(flat))
        return _count(flat, torch.ones(1, device=flat.device).expand_as(flat), low, high, bins)

    @classmethod
    def of(cls, stats: Statistics, bins: int = BINS) -> CoarseHistogram:
        """Of what was observed; the finer bins of a histogram count at their centres."""
        low, high = float(stats.minimum.min()), float(stats.maximum.max())
        return _count(stats.values.reshape(-1), stats.counts.reshape(-1), low, high, bins)


def _count(values: Tensor, counts: Tensor, low: float, high: float, bins: int) -> CoarseHistogram:
    width = (high - low) / bins
    position = ((values.double() - low) / (width or 1.0)).long().clamp(0, bins - 1)
    # On the CPU, where sums do not change from run to run.
    summed = torch.bincount(position.cpu(), counts.double().cpu(), minlength=bins)
    zeros = int(counts[values == 0].double().sum())
    return CoarseHistogram(low, high, tuple(int(count) for count in summed.round().tolist()), zeros)

"""Long samples summed up in few weighted values, so that searches over them stay cheap."""

from __future__ import annotations

import torch
from torch import Tensor

from dqss.observers.base import Statistics


def compress(stats: Statistics, size: int) -> Statistics:
    """A sample of at most about ``size`` weighted values that stands for ``stats``.

    The sorted values are cut into runs: at ``size / 2`` equidistant points of the range, which
    bounds the error in sparse tails, and after every ``2 n / size`` values, which bounds it
    where values are dense even when outliers stretch the range. Exact zeros and the two extremes
    stay values of their own. A run becomes the middle of its ends, with its exact count.
    """
    n = stats.values.shape[1]
    if n <= size:
        return stats
    values = stats.values.contiguous()
    rows = values.shape[0]
    ranks = torch.linspace(0, n, size // 2 + 1, device=values.device).round().long()
    cuts = torch.cat(
        [
            torch.searchsorted(values, _edges(stats, size // 2)),
            ranks.expand(rows, -1),
            torch.searchsorted(values, torch.zeros_like(values[:, :1])),
            torch.searchsorted(values, torch.zeros_like(values[:, :1]), right=True),
            torch.searchsorted(values, stats.minimum[:, None].contiguous(), right=True),
            torch.searchsorted(values, stats.maximum[:, None].contiguous()),
        ],
        dim=1,
    )
    return _runs(stats, cuts.sort(dim=1).values)


def rebin(stats: Statistics, bins: int) -> Statistics:
    """The histogram of ``stats`` with ``bins`` equal bins between its extremes."""
    values = stats.values.contiguous()
    edges = _edges(stats, bins)
    inner = torch.searchsorted(values, edges[:, 1:-1].contiguous())
    cumulative = stats.cumulative()
    inside = cumulative.gather(1, inner)
    counts = torch.diff(inside, prepend=torch.zeros_like(inside[:, :1]), append=cumulative[:, -1:])
    centres = (edges[:, 1:] + edges[:, :-1]) / 2
    width = (stats.maximum - stats.minimum) / bins
    return Statistics(centres, counts.to(torch.float32), stats.minimum, stats.maximum, width)


def _edges(stats: Statistics, bins: int) -> Tensor:
    """Ends of ``bins`` equal bins between the extremes, ``[C, bins + 1]``."""
    steps = torch.linspace(0, 1, bins + 1, device=stats.values.device)
    return torch.lerp(stats.minimum[:, None], stats.maximum[:, None], steps)


def _runs(stats: Statistics, cuts: Tensor) -> Statistics:
    """One weighted value for each run of sorted values between neighbouring positions ``[C, m]``."""
    last = stats.values.shape[1] - 1
    first, stop = cuts[:, :-1], cuts[:, 1:]
    lower = stats.values.gather(1, first.clamp(max=last))
    upper = stats.values.gather(1, (stop - 1).clamp(min=0))
    counts = torch.diff(stats.cumulative().gather(1, cuts), dim=1)
    middles = lower / 2 + upper / 2
    return Statistics(middles, counts.to(torch.float32), stats.minimum, stats.maximum)

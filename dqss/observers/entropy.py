"""Entropy: the clip range that keeps the most information, after TensorRT's calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dqss.functional import choose_qparams
from dqss.observers.base import Algorithm, Statistics, bounded_range, full_range, running_sum
from dqss.observers.clip_search import smallest_fractions
from dqss.observers.compress import rebin
from dqss.spec import QuantSpec

_BUDGET = 1 << 20  # elements of a temporary
_BINS = (16, 2048)  # histograms of raw samples: about four values a bin, within these limits
_POINTS, _NEARBY = 48, 17  # clip values tried along an end, and then around the best of them
_PASSES = {True: ((True, True),), False: ((False, True), (True, False)) * 2}  # (low, high) moved, in turn
_TIE = 1e-9  # differences of divergence below this are rounding


@dataclass(frozen=True)
class Entropy(Algorithm):
    """Minimize the KL divergence of the quantized histogram from the original one.

    TensorRT's rule (Migacz, "8-bit inference with TensorRT", 2017), for any number of bits and
    with the codes of the very grid that is used later, so that symmetric, one-sided and affine
    grids are the same case; see :func:`divergence`. The candidates are geometric grids over the
    ends, both together on symmetric grids, in turn on affine ones; of equals the widest wins.
    Exact zeros are left out, since every grid represents them without loss.
    """

    name: ClassVar[str] = "entropy"

    def clip_range(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """See :meth:`Algorithm.clip_range`."""
        scaled, unit = stats.normalized()
        full = torch.stack(full_range(scaled, spec), dim=-1)
        if scaled.width is None:
            fewest, most = _BINS
            histogram = rebin(_without_zeros(scaled), min(most, max(fewest, scaled.values.shape[1] // 4)))
        else:
            histogram = _without_zeros(scaled)
        if _lossless(histogram, full, spec):
            return full_range(stats, spec)
        smallest = smallest_fractions(histogram, full, 2.0)
        best, step = torch.ones_like(full), smallest.log() / (_POINTS - 1)
        everywhere = torch.arange(_POINTS, device=full.device)[:, None, None] * step
        nearby = torch.linspace(-1, 1, _NEARBY, device=full.device)[:, None, None] * step
        for moved in _PASSES[spec.symmetric]:
            ends = torch.tensor(moved, device=full.device)
            line = torch.where(ends, torch.exp(everywhere), best)
            best = _least_divergent(histogram, line, spec)
            line = torch.where(ends, (best * torch.exp(nearby)).clamp(max=1.0), best)
            best = _least_divergent(histogram, line, spec)
        best = best * full * unit[:, None]
        return bounded_range(best[:, 0], best[:, 1], stats, spec)


def _least_divergent(histogram: Statistics, fractions: Tensor, spec: QuantSpec) -> Tensor:
    """The best of ``[G, C, 2]`` fractions of the full ends; the widest of equals, ``[C, 2]``."""
    full = torch.stack(full_range(histogram, spec), dim=-1)
    loss = _divergences(histogram, fractions * full, spec)
    widths = (fractions * full.abs()).sum(dim=-1)
    index = widths.where(loss <= loss.amin(dim=0) + _TIE, -1.0).argmax(dim=0)
    return fractions.gather(0, index[None, :, None].expand(-1, -1, 2))[0]


@dataclass(frozen=True)
class _Sums:
    """Running sums over the bins of a histogram, each ``[C, n + 1]`` fp64."""

    values: Tensor
    mass: Tensor
    occupied: Tensor
    entropy: Tensor

    @classmethod
    def of(cls, stats: Statistics) -> _Sums:
        counts = stats.counts.to(torch.float64)
        return cls(
            stats.values.contiguous(),
            running_sum(counts),
            running_sum(counts > 0),
            running_sum(torch.xlogy(counts, counts)),
        )

    def channels(self, part: slice) -> _Sums:
        """The same for some of the channels."""
        return _Sums(self.values[part], self.mass[part], self.occupied[part], self.entropy[part])


def _lossless(histogram: Statistics, full: Tensor, spec: QuantSpec) -> bool:
    """Whether min-max gives every bin a code of its own: no divergence, and nothing is wider.

    Centres of bins are at least half a width apart: those at the ends may be clamped.
    """
    assert histogram.width is not None
    scale, _ = choose_qparams(full[:, 0], full[:, 1], spec)
    return bool(((2 * scale < histogram.width) | (histogram.width == 0)).all())


def _without_zeros(stats: Statistics) -> Statistics:
    counts = stats.counts * (stats.values != 0)
    return Statistics(stats.values, counts, stats.minimum, stats.maximum, stats.width)


def _divergences(histogram: Statistics, ends: Tensor, spec: QuantSpec) -> Tensor:
    """:func:`divergence` of every candidate ``[G, C, 2]``, ``[G, C]``, in bounded memory."""
    candidates, channels = ends.shape[:2]
    levels = spec.qmax - spec.qmin + 2
    rows = min(channels, max(1, _BUDGET // levels))
    depth = max(1, _BUDGET // (levels * rows))
    sums = _Sums.of(histogram)
    losses = torch.empty(ends.shape[:2], dtype=torch.float64, device=ends.device)
    for c in range(0, channels, rows):
        part = slice(c, c + rows)
        for g in range(0, candidates, depth):
            block = ends[g : g + depth, part]
            losses[g : g + depth, part] = divergence(sums.channels(part), block, spec)
    return losses


def divergence(sums: _Sums, ends: Tensor, spec: QuantSpec) -> Tensor:
    """KL divergence of quantized histograms from their original, for G clip ranges a channel.

    P is the histogram inside the clip range, with what lies outside added to its outermost
    occupied bins. Q has, in every occupied bin, the mean count of the occupied bins that share
    its integer code, counting only what lies inside. Both are normalized. A range without any
    count has infinite divergence.

    Codes rise along the bins, so that each is a run of bins, and running sums give all of it
    from the positions where the runs begin, with no pass over the bins (halves round upwards).

    Args:
        sums: of C histograms of n bins.
        ends: ``[G, C, 2]``, low and high.
        spec: the grid.

    Returns:
        ``[G, C]`` fp64, natural logarithm.
    """
    low, high = ends[..., 0].T.contiguous(), ends[..., 1].T.contiguous()
    begin = torch.searchsorted(sums.values, low)
    stop = torch.searchsorted(sums.values, high, right=True)
    below = sums.mass.gather(1, begin)
    above = sums.mass[:, -1:] - sums.mass.gather(1, stop)
    inside = sums.mass[:, -1:] - below - above

    mean, mass = _code_means(sums, low, high, begin, stop, spec)
    held = mass > 0
    first = held.to(torch.int8).argmax(dim=-1, keepdim=True)
    last = mean.shape[-1] - 1 - held.flip(-1).to(torch.int8).argmax(dim=-1, keepdim=True)
    cross = torch.xlogy(mass, mean).sum(dim=-1)
    cross += torch.xlogy(below, mean.gather(-1, first)[..., 0])
    cross += torch.xlogy(above, mean.gather(-1, last)[..., 0])

    own = sums.entropy.gather(1, stop) - sums.entropy.gather(1, begin)
    own += _end_terms(sums, begin, stop, below, above)
    total = sums.mass[:, -1:].clamp(min=1e-30)
    loss = (own - cross) / total + torch.log(inside / total)
    loss = torch.where(inside > 0, loss, torch.inf)
    return torch.where(sums.mass[:, -1:] > 0, loss, 0.0).T


def _code_means(
    sums: _Sums, low: Tensor, high: Tensor, begin: Tensor, stop: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Mean count of the occupied bins of each code, and their total, each ``[C, G, codes]``."""
    scale, zero_point = choose_qparams(low, high, spec)
    codes = torch.arange(spec.qmin + 1, spec.qmax + 1, device=low.device)
    thresholds = (codes - zero_point[..., None] - 0.5) * scale[..., None]
    cuts = torch.searchsorted(sums.values, thresholds.flatten(1)).view(thresholds.shape)
    cuts = torch.clamp(cuts, begin[..., None], stop[..., None])
    cuts = torch.cat([begin[..., None], cuts, stop[..., None]], dim=-1)
    shape, flat = cuts.shape, cuts.flatten(1)
    mass = sums.mass.gather(1, flat).view(shape).diff(dim=-1)
    occupied = sums.occupied.gather(1, flat).view(shape).diff(dim=-1)
    return mass / occupied.clamp(min=1), mass


def _end_terms(sums: _Sums, begin: Tensor, stop: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """What the mass from outside, joining the end bins, adds to the sum of ``P log P``."""
    first = torch.searchsorted(sums.occupied, sums.occupied.gather(1, begin) + 1).sub_(1)
    last = torch.searchsorted(sums.occupied, sums.occupied.gather(1, stop)).sub_(1)
    most = sums.values.shape[1] - 1
    first, last = first.clamp(0, most), last.clamp(0, most)
    counts = sums.mass.diff(dim=1)
    one = first == last
    at_first, at_last = counts.gather(1, first), counts.gather(1, last)
    to_first = below + torch.where(one, above, 0.0)
    to_last = torch.where(one, 0.0, above)
    return _gain(at_first, to_first) + _gain(at_last, to_last)


def _gain(count: Tensor, added: Tensor) -> Tensor:
    return torch.xlogy(count + added, count + added) - torch.xlogy(count, count)

"""The two contracts of a static algorithm: the statistics it reads, the clip range it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dqss.functional import choose_qparams
from dqss.spec import QuantSpec


@dataclass(frozen=True)
class BatchExtremes:
    """The extremes of each of B batches, oldest first: ``minima`` and ``maxima``, ``[B, C]`` fp32."""

    minima: Tensor
    maxima: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> BatchExtremes:
        """The same with ``function`` applied to both."""
        return BatchExtremes(function(self.minima), function(self.maxima))


@dataclass(frozen=True)
class Statistics:
    """A weighted sample of C channels, shared by every algorithm of a tensor.

    For weights it holds the values themselves (``counts`` all one); for activations the
    bins of a streaming histogram. ``C = 1`` per tensor.

    Attributes:
        values: ``[C, n]`` fp32, ascending along n.
        counts: ``[C, n]`` fp32, how often each value was seen (may be a broadcast view).
        minimum, maximum: ``[C]`` fp32, exact extremes of what was seen.
        width: ``[C]`` fp32, spacing of ``values`` where they are the bins of a histogram;
            None where they are the sample itself.
        importance: ``[C, n]`` fp64, not negative: how much an error at each value counts, summed
            over all that have it, in any unit; None where nobody asked or it is not known.
        batches: extremes of each batch where they were kept; None for a single batch.
    """

    values: Tensor
    counts: Tensor
    minimum: Tensor
    maximum: Tensor
    width: Tensor | None = None
    importance: Tensor | None = None
    batches: BatchExtremes | None = None

    @classmethod
    def of(cls, rows: Tensor, counts: Tensor | None = None, importance: Tensor | None = None) -> Statistics:
        """Statistics of the rows ``[C, n]`` themselves, exactly.

        Args:
            rows: the values.
            counts: how often each is there, one time each by default; at 0 it only fills up a row.
            importance: of each value.
        """
        values, order = torch.sort(rows.detach().to(torch.float32), dim=1)
        if counts is None:
            counts = torch.ones((1, 1), device=values.device).expand_as(values)
        else:
            counts = counts.to(torch.float32).gather(1, order)
        if importance is not None:
            importance = importance.to(torch.float64).gather(1, order)
        return cls(values, counts, values[:, 0], values[:, -1], importance=importance)

    def normalized(self) -> tuple[Statistics, Tensor]:
        """The same statistics in units of a power of two near each channel's largest magnitude.

        Powers and exponentials of the result neither overflow nor underflow, and since the
        division is exact, whatever is computed from it is exactly equivariant under scaling of
        the data by powers of two.

        Returns:
            The statistics, magnitudes at most 1, and the unit ``[C]`` (1 for all-zero channels).
        """
        largest = torch.maximum(self.minimum.abs(), self.maximum.abs())
        unit = power_of_two(torch.frexp(largest).exponent.where(largest > 0, 0))
        scaled = replace(
            self,
            values=self.values / unit[:, None],
            minimum=self.minimum / unit,
            maximum=self.maximum / unit,
            width=None if self.width is None else self.width / unit,
            batches=None if self.batches is None else self.batches.map(lambda x: x / unit),
        )
        return scaled, unit

    def channels(self, chosen: Tensor) -> Statistics:
        """Those of the channels where ``chosen`` ``[C]`` is true."""
        if bool(chosen.all()):
            return self
        return Statistics(
            self.values[chosen],
            self.counts[chosen],
            self.minimum[chosen],
            self.maximum[chosen],
            None if self.width is None else self.width[chosen],
            None if self.importance is None else self.importance[chosen],
            None if self.batches is None else self.batches.map(lambda x: x[:, chosen]),
        )

    def within(self, spec: QuantSpec) -> Statistics:
        """What a grid can tell apart: to an unsigned symmetric one, negative values are zeros."""
        if spec.mirrored or not spec.symmetric or bool((self.minimum >= 0).all()):
            return self
        return replace(
            self,
            values=self.values.clamp(min=0.0),
            minimum=self.minimum.clamp(min=0.0),
            maximum=self.maximum.clamp(min=0.0),
            batches=None if self.batches is None else self.batches.map(lambda x: x.clamp(min=0.0)),
        )

    def average(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Mean of ``function`` (elementwise, of fp64) over all that was seen, ``[C]`` fp64."""
        counts = self.counts.to(torch.float64)
        return (function(self.values.to(torch.float64)) * counts).sum(dim=1) / counts.sum(dim=1)

    def by_importance(self) -> Statistics:
        """The same with values counted by their importance; by number where none has any."""
        if self.importance is None:
            return self
        total = self.importance.sum(dim=1, keepdim=True)
        share = self.importance / total * self.counts.sum(dim=1, dtype=torch.float64, keepdim=True)
        return replace(self, counts=torch.where(total > 0, share.to(torch.float32), self.counts))

    def cumulative(self) -> Tensor:
        """Running sum of the counts along n with a leading zero, ``[C, n + 1]`` fp64."""
        return running_sum(self.counts)


def running_sum(x: Tensor) -> Tensor:
    """Running sum of ``[C, n]`` along n with a leading zero, ``[C, n + 1]`` fp64.

    On the CPU whatever the device of ``x``: on CUDA the order of the additions, and so the last
    bits, would change from run to run.
    """
    sums = torch.cumsum(x.to("cpu", torch.float64), dim=1)
    return torch.nn.functional.pad(sums, (1, 0)).to(x.device)


def power_of_two(exponent: Tensor) -> Tensor:
    """``2 ** exponent`` as fp32, exactly, for integer exponents (clamped to -126..127)."""
    biased = exponent.clamp(-126, 127).to(torch.int32) + 127
    return (biased << 23).view(torch.float32)


def full_range(stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The range with nothing clipped, ``(low, high)``, each ``[C]``, in the form of ``spec``.

    It contains zero; signed symmetric grids get ``low = -high``.
    """
    low, high = stats.minimum.clamp(max=0.0), stats.maximum.clamp(min=0.0)
    if spec.mirrored:
        high = torch.maximum(-low, high)
        low = -high
    return low, high


def bounded_range(low: Tensor, high: Tensor, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """A proposed range made valid: around zero and inside :func:`full_range`.

    A proposal that is empty (most of a sparse channel is zero, say) or undefined is replaced by
    the full range: it would otherwise set a scale that has nothing to do with the data.
    """
    full_low, full_high = full_range(stats, spec)
    low = torch.maximum(low.to(torch.float32).clamp(max=0.0), full_low)
    high = torch.minimum(high.to(torch.float32).clamp(min=0.0), full_high)
    usable = high - low > 0
    return torch.where(usable, low, full_low), torch.where(usable, high, full_high)


class Algorithm(ABC):
    """A rule that turns statistics into quantization parameters.

    Subclasses are frozen dataclasses whose fields are the algorithm's parameters; they set
    ``name`` and implement :meth:`clip_range`, or :meth:`solve` where a range does not say all.
    They hold no state.

    Attributes:
        name: what candidates call it.
        needs_gradients: whether it reads ``Statistics.importance``.
        needs_batches: whether it reads ``Statistics.batches``.
        needs_inputs: whether weights are rounded to fit the inputs of their layer, see :mod:`dqss.fitting`.
        shifts: whether every scale is a power of two, so that repair leaves scales as they are.
    """

    name: ClassVar[str]
    needs_gradients: ClassVar[bool] = False
    needs_batches: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False
    shifts: ClassVar[bool] = False

    @abstractmethod
    def clip_range(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """The real interval to represent, ``(low, high)``, each ``[C]``, ``low <= 0 <= high``.

        For signed symmetric grids ``low = -high``. A channel that never went below zero gets
        ``low = 0`` on the others (one-sided form); likewise above. For unsigned symmetric grids
        no statistics go below zero: see :meth:`Statistics.within`.
        """

    def solve(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """``(scale, zero_point)``, each ``[C]`` fp32, for statistics that are within ``spec``."""
        low, high = self.clip_range(stats, spec)
        return choose_qparams(low, high, spec)

    def qparams(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """``(scale, zero_point)``, each ``[C]`` fp32."""
        return self.solve(stats.within(spec), spec)

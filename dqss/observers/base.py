"""The two contracts of a static algorithm: the statistics it reads, the clip range it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dqss.functional import choose_qparams
from dqss.spec import QuantSpec


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
    """

    values: Tensor
    counts: Tensor
    minimum: Tensor
    maximum: Tensor
    width: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor) -> Statistics:
        """Statistics of the rows ``[C, n]`` themselves, exactly."""
        values = torch.sort(rows.detach().to(torch.float32), dim=1).values
        counts = torch.ones((1, 1), device=values.device).expand_as(values)
        return cls(values, counts, values[:, 0], values[:, -1])

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
        width = None if self.width is None else self.width / unit
        scaled = Statistics(
            self.values / unit[:, None], self.counts, self.minimum / unit, self.maximum / unit, width
        )
        return scaled, unit

    def channels(self, chosen: Tensor) -> Statistics:
        """Those of the channels where ``chosen`` ``[C]`` is true."""
        if bool(chosen.all()):
            return self
        width = None if self.width is None else self.width[chosen]
        return Statistics(
            self.values[chosen], self.counts[chosen], self.minimum[chosen], self.maximum[chosen], width
        )

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

    It contains zero; symmetric grids get ``low = -high``.
    """
    low, high = stats.minimum.clamp(max=0.0), stats.maximum.clamp(min=0.0)
    if spec.symmetric:
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
    ``name`` and implement :meth:`clip_range`. They hold no state.
    """

    name: ClassVar[str]

    @abstractmethod
    def clip_range(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """The real interval to represent, ``(low, high)``, each ``[C]``, ``low <= 0 <= high``.

        For symmetric grids ``low = -high``. A channel that never went below zero gets
        ``low = 0`` on affine grids (one-sided form); likewise above.
        """

    def qparams(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """``(scale, zero_point)``, each ``[C]`` fp32."""
        low, high = self.clip_range(stats, spec)
        return choose_qparams(low, high, spec)

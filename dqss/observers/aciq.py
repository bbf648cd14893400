"""ACIQ: the clip range that is best for a bell curve fitted to the values (arXiv 1810.05723)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from dqss.observers.base import Algorithm, Statistics, bounded_range
from dqss.spec import QuantSpec

_WIDEST = 60.0  # clip, in standard units: beyond the optimum of 16 bits for either density


def gaussian_tail(t: float) -> float:
    """Squared clipping error above ``t`` of a standard normal: the mean of ``max(x - t, 0) ** 2``."""
    beyond = 0.5 * math.erfc(t / math.sqrt(2))
    density = math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    return (1 + t * t) * beyond - t * density


def laplace_tail(t: float) -> float:
    """Squared clipping error above ``t`` of a Laplace density with ``b = 1``."""
    return math.exp(-t)


@lru_cache(maxsize=256)
def optimal_step(tail: Callable[[float], float], below: float, above: float) -> float:
    """The step that minimizes the expected squared error of clipping and rounding.

    The error of a grid with ``below`` steps under the centre of the density and ``above`` steps
    over it is ``step^2 / 12 + tail(below * step) + tail(above * step)``; with ``below = above =
    2^(M - 1)`` that is eq. 5 of arXiv 1810.05723. ``below = 0`` means a one-sided density (half
    normal, exponential), whose only tail is twice as heavy.

    Args:
        tail: squared clipping error of the standard density at one side.
        below, above: numbers of steps, which need not be whole.

    Returns:
        The step in units of the density's scale.
    """

    def error(clip: float) -> float:
        step = clip / above
        other = tail(below * step) if below else tail(clip)
        return step * step / 12 + tail(clip) + other

    # Both terms are convex in the clip, so that a bounded search finds the only minimum.
    found = minimize_scalar(error, bounds=(1e-3, _WIDEST), method="bounded", options={"xatol": 1e-9})
    return float(found.x) / above


@dataclass(frozen=True)
class _ACIQ(Algorithm):
    """What the two densities share.

    Exact zeros are left out of the fit, since every grid represents them without error: the
    spike that a ReLU leaves says nothing about the width of the rest.
    """

    @abstractmethod
    def _tail(self) -> Callable[[float], float]:
        """Squared clipping error at one side of the standard density."""

    @abstractmethod
    def _spread(self, deviations: Tensor, weights: Tensor) -> Tensor:
        """The density's scale ``[C]``, from deviations and weights that sum to one, ``[C, n]``."""

    def clip_range(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """See :meth:`Algorithm.clip_range`."""
        scaled, unit = stats.normalized()
        weights = scaled.counts.to(torch.float64) * (scaled.values != 0)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-30)
        values = scaled.values.to(torch.float64)
        positive, negative = scaled.minimum >= 0, scaled.maximum <= 0
        centre = torch.zeros_like(values[:, 0])
        if not spec.mirrored:
            centre = (values * weights).sum(dim=1).masked_fill(positive | negative, 0.0)
        spread = self._spread(values - centre[:, None], weights)
        low, high = self._ends(spec, positive, negative)
        return bounded_range((centre - low * spread) * unit, (centre + high * spread) * unit, stats, spec)

    def _ends(self, spec: QuantSpec, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """Distances of the ends from the centre in units of the spread, each ``[C]`` fp64."""
        tail, one = self._tail(), torch.ones_like(positive, dtype=torch.float64)
        if spec.mirrored:
            # The step is what counts: symmetric grids have one more code below than above.
            step = torch.where(positive, optimal_step(tail, 0, spec.qmax), one)
            step = torch.where(negative & ~positive, optimal_step(tail, 0, -spec.qmin), step)
            both = optimal_step(tail, -spec.qmin, spec.qmax)
            clip = torch.where(positive | negative, step, both * one) * spec.qmax
            return clip, clip
        steps = spec.qmax - spec.qmin
        single = optimal_step(tail, 0, steps) * steps
        both = optimal_step(tail, steps / 2, steps / 2) * steps / 2
        low = torch.where(negative, single, both * one).masked_fill(positive, 0.0)
        high = torch.where(positive, single, both * one).masked_fill(negative, 0.0)
        return low, high


@dataclass(frozen=True)
class ACIQGaussian(_ACIQ):
    """Clip at the optimum for a normal density (half normal when no value is negative)."""

    name: ClassVar[str] = "aciq_gaussian"

    def _tail(self) -> Callable[[float], float]:
        return gaussian_tail

    def _spread(self, deviations: Tensor, weights: Tensor) -> Tensor:
        return (deviations.square() * weights).sum(dim=1).sqrt()


@dataclass(frozen=True)
class ACIQLaplace(_ACIQ):
    """Clip at the optimum for a Laplace density (exponential when no value is negative)."""

    name: ClassVar[str] = "aciq_laplace"

    def _tail(self) -> Callable[[float], float]:
        return laplace_tail

    def _spread(self, deviations: Tensor, weights: Tensor) -> Tensor:
        return (deviations.abs() * weights).sum(dim=1)

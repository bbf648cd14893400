"""Power of two: scales that hardware applies with a shift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dqss.functional import choose_qparams
from dqss.observers.base import Algorithm, Statistics, full_range
from dqss.observers.clip_search import qparam_errors
from dqss.observers.compress import compress
from dqss.spec import QuantSpec

_EXPONENTS = 16  # from the scale that clips nothing downwards
_COARSE, _FINE = 512, 1024  # sizes of the samples that stand for longer ones
_PLACES = 9  # zero points tried at a time


@dataclass(frozen=True)
class PowerOfTwo(Algorithm):
    """The scale ``2^k`` with the least squared quantization error.

    Affine grids also choose the zero point, for where a smaller scale cannot hold the range it
    decides which end is clipped. The clip range is the represented one, as far as values were
    seen; an all-zero channel gets scale 1.
    """

    name: ClassVar[str] = "power_of_two"
    shifts: ClassVar[bool] = True

    def clip_range(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """See :meth:`Algorithm.clip_range`."""
        scale, zero_point = self.solve(stats, spec)
        full_low, full_high = full_range(stats, spec)
        high = torch.minimum((spec.qmax - zero_point) * scale, full_high)
        low = -high if spec.mirrored else torch.maximum((spec.qmin - zero_point) * scale, full_low)
        return low, high

    def solve(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """See :meth:`Algorithm.solve`; every scale is exactly a power of two."""
        scaled, unit = stats.normalized()
        low, high = full_range(scaled, spec)
        scales = _scales(choose_qparams(low, high, spec)[0])
        if spec.symmetric:
            zero_point = torch.zeros_like(low)
            sample = compress(scaled, _FINE)
            errors = qparam_errors(sample, scales, torch.zeros_like(scales), spec, 2.0)
            scale = scales.gather(0, errors.argmin(dim=0, keepdim=True))[0]
        else:
            scale, zero_point = _affine(scaled, scales, low, high, spec)
        return torch.where(high > low, scale * unit, torch.ones_like(scale)), zero_point


def _scales(widest: Tensor) -> Tensor:
    """Powers of two from the first at or above ``widest`` ``[C]`` downwards, ``[G, C]``."""
    mantissa, _ = torch.frexp(widest)
    top = torch.where(mantissa == 0.5, widest, widest / mantissa)
    halvings = torch.arange(_EXPONENTS, device=widest.device)
    return top * torch.exp2(-halvings.to(torch.float32))[:, None]


def _affine(
    stats: Statistics, scales: Tensor, low: Tensor, high: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Best scale of ``[G, C]`` and zero point for it, between clipping only above and only below."""
    only_above = (spec.qmin - torch.round(low / scales)).clamp(spec.qmin, spec.qmax)
    only_below = (spec.qmax - torch.round(high / scales)).clamp(spec.qmin, spec.qmax)
    places = torch.linspace(0, 1, _PLACES, device=low.device)[:, None, None]
    zero_points = torch.round(torch.lerp(only_below, only_above, places)).flatten(0, 1)
    candidates = scales.repeat(_PLACES, 1)
    scale, zero_point = _best(compress(stats, _COARSE), candidates, zero_points, spec)
    sample = compress(stats, _FINE)
    spacing = (only_above - only_below).abs().amax(dim=0) / (_PLACES - 1)
    while bool((spacing > 1).any()):
        # Channels whose places are next to each other stay, whatever others need.
        offsets = torch.linspace(-1, 1, _PLACES, device=low.device)[:, None] * spacing.where(spacing > 1, 0.0)
        nearby = torch.round(zero_point + offsets).clamp(spec.qmin, spec.qmax)
        scale, zero_point = _best(sample, scale.expand_as(nearby), nearby, spec)
        spacing = spacing * 2 / (_PLACES - 1)
    return scale, zero_point


def _best(sample: Statistics, scales: Tensor, zero_points: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    errors = qparam_errors(sample, scales, zero_points, spec, 2.0)
    index = errors.argmin(dim=0, keepdim=True)
    return scales.gather(0, index)[0], zero_points.gather(0, index)[0]

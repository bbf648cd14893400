"""Hessian: the clip range with the least squared error, each value weighted by its curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dqss.observers.base import Algorithm, Statistics
from dqss.observers.clip_search import search_clip
from dqss.spec import QuantSpec


@dataclass(frozen=True)
class Hessian(Algorithm):
    """Minimize the sum of ``h * (fake_quantize(x) - x) ** 2``, with ``h`` the diagonal of a Hessian.

    To second order that sum is what quantizing this tensor adds to the distance between the
    outputs of the quantized and the float network. ``h`` is the diagonal of the Fisher (or
    Gauss-Newton) matrix, estimated from squared gradients as in BRECQ (arXiv 2102.05426); no
    labels are involved, see :mod:`dqss.calibration`. Where no gradient is known, or all of a
    channel's vanish, it is the MSE algorithm.
    """

    name: ClassVar[str] = "hessian"
    needs_gradients: ClassVar[bool] = True

    def clip_range(self, stats: Statistics, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """See :meth:`Algorithm.clip_range`."""
        return search_clip(stats.by_importance(), spec, 2.0)

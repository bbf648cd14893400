"""What a quantizer computes, as a pure function of the tensor and of what it learns.

Rounding has no derivative to learn from, so that each algorithm brings another function, whose
derivative is its training rule (straight-through estimation, arXiv 1308.3432). A formula is both. It is
hashable: mixtures are compiled once for each tuple of formulas, whatever the sizes of the tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dqss.spec import QuantSpec


@dataclass(frozen=True)
class Formula(ABC):
    """Quantize-dequantize on the integer grid ``qmin..qmax``.

    Attributes:
        qmin, qmax: smallest and largest integer code, inclusive.
        arity: how many vectors it takes beside ``x``.
        learning: how many of them, the first ones, have a gradient. The others are made of these,
            outside, since a loop over all elements is no place to compute with a channel's own values.
    """

    qmin: int
    qmax: int
    arity: ClassVar[int]
    learning: ClassVar[int]

    @abstractmethod
    def parts(self, x: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The value, and what stands for it on the way back.

        Args:
            x: ``[A, C, B, ...]`` fp32.
            vectors: ``arity`` fp32 tensors that broadcast against ``x``, one value a channel.

        Returns:
            The quantized ``x``, and the carrier of its gradient: a function of the same arguments whose
            value does not matter and whose derivative is the algorithm's training rule.
        """

    def __call__(self, x: Tensor, *vectors: Tensor) -> Tensor:
        """Quantize and dequantize; differentiable as the algorithm is trained."""
        value, carrier = self.parts(x, *vectors)
        # value + (carrier - value) would round; the difference here is zero.
        return value.detach() + (carrier - carrier.detach())


@dataclass(frozen=True)
class FixedGrid(Formula):
    """A grid that does not learn; the gradient of ``x`` passes where its code was not clipped."""

    arity: ClassVar[int] = 3
    learning: ClassVar[int] = 0

    @classmethod
    def of(cls, spec: QuantSpec) -> FixedGrid:
        """For the integers of ``spec``."""
        return cls(spec.qmin, spec.qmax)

    def vectors(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, ...]:
        """Scale and both bounds of ``code - zero_point``."""
        return scale, self.qmin - zero_point, self.qmax - zero_point

    def parts(self, x: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Formula.parts`."""
        scale, low, high = vectors
        codes = torch.round(x.detach() / scale)
        clipped = between(codes, low, high)
        return clipped * scale, torch.where(codes == clipped, x, 0.0)


def between(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``x`` clamped to bounds that broadcast."""
    return torch.minimum(torch.maximum(x, low), high)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` itself; its gradient is multiplied by ``factor``."""
    result: Tensor = _ScaleGradient.apply(x, factor)
    return result

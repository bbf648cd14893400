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
        arity: how many tensors it takes beside ``x``.
    """

    qmin: int
    qmax: int
    arity: ClassVar[int]

    @abstractmethod
    def parts(self, x: Tensor, *learned: Tensor) -> tuple[Tensor, Tensor]:
        """The value, and what stands for it on the way back.

        Args:
            x: ``[A, C, B, ...]`` fp32.
            learned: ``arity`` fp32 tensors that broadcast against ``x``, one value a channel.

        Returns:
            The quantized ``x``, and the carrier of its gradient: a function of the same arguments whose
            value does not matter and whose derivative is the algorithm's training rule.
        """

    def __call__(self, x: Tensor, *learned: Tensor) -> Tensor:
        """Quantize and dequantize; differentiable as the algorithm is trained."""
        value, carrier = self.parts(x, *learned)
        # value + (carrier - value) would round; the difference here is zero.
        return value.detach() + (carrier - carrier.detach())


@dataclass(frozen=True)
class FixedGrid(Formula):
    """A grid that does not learn; the gradient of ``x`` passes where its code was not clipped."""

    arity: ClassVar[int] = 2

    @classmethod
    def of(cls, spec: QuantSpec) -> FixedGrid:
        """For the integers of ``spec``."""
        return cls(spec.qmin, spec.qmax)

    def parts(self, x: Tensor, *learned: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Formula.parts`; ``learned`` are scale and zero point."""
        scale, zero_point = (part.detach() for part in learned)
        codes = torch.round(x.detach() / scale)
        clipped = between(codes, self.qmin - zero_point, self.qmax - zero_point)
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

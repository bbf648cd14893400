"""What a quantizer computes, as a pure function of the tensor and of what it learns.

A formula is differentiable torch, with rounding passed straight through (arXiv 1308.3432), so that its
derivative is the training rule of its paper. It is hashable: mixtures are compiled once for each
tuple of formulas, whatever the sizes of the tensors.
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
    def __call__(self, x: Tensor, *learned: Tensor) -> Tensor:
        """Quantize and dequantize.

        Args:
            x: ``[A, C, B]`` fp32.
            learned: ``arity`` tensors ``[C, 1]`` fp32.

        Returns:
            ``[A, C, B]``, differentiable with respect to all that learns.
        """


@dataclass(frozen=True)
class FixedGrid(Formula):
    """A grid that does not learn; the gradient of ``x`` passes where its code was not clipped."""

    arity: ClassVar[int] = 2

    @classmethod
    def of(cls, spec: QuantSpec) -> FixedGrid:
        """For the integers of ``spec``."""
        return cls(spec.qmin, spec.qmax)

    def __call__(self, x: Tensor, *learned: Tensor) -> Tensor:
        """``learned`` are scale and zero point. See :meth:`Formula.__call__`."""
        scale, zero_point = (part.detach() for part in learned)
        codes = torch.round(x.detach() / scale)
        clipped = torch.minimum(torch.maximum(codes, self.qmin - zero_point), self.qmax - zero_point)
        return passing(clipped * scale, torch.where(codes == clipped, x, 0.0))


def passing(value: Tensor, carrier: Tensor) -> Tensor:
    """``value``, to the bit, with the gradient of ``carrier``, which is finite."""
    # value + (carrier - value) would round; the difference here is zero.
    return value.detach() + (carrier - carrier.detach())


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes straight through."""
    return passing(torch.round(x.detach()), x)


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

"""What the integer kernels of ONNX Runtime compute from integers and scales, to the bit. Pure mathematics.

Found out by experiment and from its public sources (MLAS, x86): which product is rounded before which
sum decides where a value goes that is nearly half-way between two integers. Where those kernels multiply
and add with one rounding, the same is done in fp64: a product of eight bits and a scale is exact there,
and the sum is rounded to fp32 from more than twice as many bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dqss.mixing import Grid


@dataclass(frozen=True)
class Bytes:
    """A grid of eight bits as unsigned bytes: ``value = (byte - zero) * scale``.

    Attributes:
        scale, zero: fp32 scalars; the zero point is a whole number in 0..255.
    """

    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, grid: Grid) -> Bytes:
        """Signed codes move up by 128."""
        return cls(grid.scale.reshape(()), (grid.zero_point - grid.spec.qmin).reshape(()))

    def read(self, values: Tensor) -> Tensor:
        """``byte - zero`` of values on the grid, as whole numbers in fp32."""
        return (values / self.scale).round_()

    def requantize(self, total: Tensor, multiplier: Tensor) -> Tensor:
        """The value on this grid that stands for ``total * multiplier`` steps.

        Args:
            total: a sum, whole numbers in fp32; those beyond 2^24 are rounded to it.
            multiplier: fp32; broadcasts.
        """
        steps = (total * multiplier).clamp_(-self.zero, 255 - self.zero)
        return steps.round_().mul_(self.scale)

    def saturate(self, code: Tensor) -> Tensor:
        """The value of a byte, rounded and kept in its range; ``code`` counts from 0, fp32."""
        return (torch.round(code).clamp(0, 255) - self.zero) * self.scale


def add(left: Tensor, right: Tensor, a: Bytes, b: Bytes, c: Bytes) -> Tensor:
    """The sum on grid ``c`` of values on the grids ``a`` and ``b``, of one shape (``QLinearAdd``)."""
    over, under = a.scale / c.scale, b.scale / c.scale
    fixed = c.zero - multiply_add(over, a.zero, under * b.zero)
    inner = multiply_add(b.read(right) + b.zero, under, fixed)
    return c.saturate(multiply_add(a.read(left) + a.zero, over, inner))


def mean(total: Tensor, count: int, a: Bytes, c: Bytes) -> Tensor:
    """The mean on grid ``c`` of ``count`` values on grid ``a`` (``QLinearGlobalAveragePool``).

    Args:
        total: the sum of what :meth:`Bytes.read` gives.
        count: below 2^24.
        a, c: grids.
    """
    return c.requantize(total, a.scale / (c.scale * float(count)))


def multiply_add(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """``x * y + z`` in fp32, rounded once."""
    return (x.double() * y.double() + z.double()).float()

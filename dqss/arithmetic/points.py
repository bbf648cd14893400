"""Additions and averages of quantized tensors, as integer kernels compute them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dqss.arithmetic.numbers import Bytes, add, mean
from dqss.mixing import Grid
from dqss.products.attach import ProductQuantizer
from dqss.products.meet import POOL, SUM, Meeting
from dqss.products.multiply import Product

_ADAPTIVE = {F.adaptive_avg_pool1d: 3, F.adaptive_avg_pool2d: 4, F.adaptive_avg_pool3d: 5}
"""With the axes of a batch."""
_MEANS = (torch.mean, torch.Tensor.mean)


class IntegerPoint(ProductQuantizer):
    """A point whose result is read on one grid.

    Args:
        quantizer: of its operands.
        operands: their grids.
        output: the grid of the result.
    """

    def __init__(self, quantizer: ProductQuantizer, operands: list[Grid], output: Grid) -> None:
        super().__init__(quantizer.name, quantizer.kind, dict(quantizer.operands.items()))
        self.count = len(operands)
        for number, grid in enumerate((*operands, output)):
            found = Bytes.of(grid)
            self.register_buffer(f"scale{number}", found.scale, persistent=False)
            self.register_buffer(f"zero{number}", found.zero, persistent=False)

    def forward(self, product: Product | Meeting) -> Any:
        """What the integer kernel gives, as real numbers; in real arithmetic where there is none for it."""
        if not isinstance(product, Meeting) or not self._takes(product) or torch.compiler.is_exporting():
            return super().forward(product)
        pairs = zip(product.names, product.given, strict=True)
        operands = [self.quantize(name, x).float() for name, x in pairs]
        return product.returned(self._result(product, *operands).to(product.given[0].dtype))

    def grids(self) -> tuple[Bytes, ...]:
        """Of the operands and the result."""
        count = range(self.count + 1)
        return tuple(Bytes(getattr(self, f"scale{n}"), getattr(self, f"zero{n}")) for n in count)

    def _takes(self, meeting: Meeting) -> bool:
        raise NotImplementedError

    def _result(self, meeting: Meeting, *operands: Tensor) -> Tensor:
        raise NotImplementedError


class IntegerSum(IntegerPoint):
    """The sum of two tensors of one shape."""

    def _takes(self, meeting: Meeting) -> bool:
        one, other = meeting.given
        return one.shape == other.shape and len(meeting.args) <= 2 and meeting.kwargs.get("alpha", 1) == 1

    def _result(self, meeting: Meeting, *operands: Tensor) -> Tensor:
        (left, right), (a, b, c) = operands, self.grids()
        return add(left, right, a, b, c)


class IntegerMean(IntegerPoint):
    """The mean over all axes behind that of the channels."""

    def _takes(self, meeting: Meeting) -> bool:
        return is_global(meeting)

    def _result(self, meeting: Meeting, *operands: Tensor) -> Tensor:
        (x,), (inputs, output) = operands, self.grids()
        # Sums of whole numbers in fp64 are exact.
        total = inputs.read(x).double().flatten(2).sum(2).float()
        return with_axes(mean(total, math.prod(x.shape[2:]), inputs, output), meeting)


def with_axes(found: Tensor, meeting: Meeting) -> Tensor:
    """Means ``[N, C]`` with the axes that the function leaves behind them."""
    keeps = meeting.func in _ADAPTIVE or meeting.kwargs.get("keepdim", False) or True in meeting.args[2:]
    return found.reshape(*found.shape, *[1] * (meeting.given[0].ndim - 2)) if keeps else found


def is_global(meeting: Meeting) -> bool:
    """Whether that is the mean over all axes behind those of batch and channels."""
    x = meeting.given[0]
    if meeting.func in _ADAPTIVE:
        size = meeting.args[1] if len(meeting.args) > 1 else meeting.kwargs.get("output_size")
        ones = set(size if isinstance(size, (tuple, list)) else [size]) == {1}
        return ones and x.ndim == _ADAPTIVE[meeting.func]
    if meeting.func in _MEANS and x.ndim > 2:
        axes = meeting.args[1] if len(meeting.args) > 1 else meeting.kwargs.get("dim")
        axes = axes if isinstance(axes, (tuple, list)) else [axes]
        plain = meeting.kwargs.get("dtype") is None and None not in axes
        return plain and {axis % x.ndim for axis in axes} == set(range(2, x.ndim))
    return False


KERNELS: dict[str, type[IntegerPoint]] = {SUM: IntegerSum, POOL: IntegerMean}
"""By the kind of a point. A concatenation gives each operand on the grid of the result, as it is anyway."""

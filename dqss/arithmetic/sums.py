"""Sums of products of whole numbers, exact whatever the order is that they are added in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EXACT = 2**24
"""Whole numbers up to here are exact in fp32, and so is every sum that never leaves them."""
PEAK = 255
"""Largest ``byte - zero``."""
HALF = 16
"""A byte is two halves of four bits, which are added up apart."""


@dataclass(frozen=True)
class Largest:
    """How large the numbers in a sum can get.

    Attributes:
        products: the sum of the magnitudes of a channel's codes, the largest of all channels.
        bias: magnitude of the largest bias.
    """

    products: int
    bias: int

    @classmethod
    def of(cls, codes: Tensor, bias: Tensor | None) -> Largest:
        """Of integers ``[C, ...]`` and whole numbers ``[C]``."""
        rows = codes.to(torch.int64).abs().flatten(1).sum(1)
        most = 0 if bias is None else int(bias.abs().max())
        return cls(int(rows.max()), most)

    def fits(self, peak: int, factor: int) -> bool:
        """Whether sums of products with numbers up to ``peak``, times ``factor``, stay exact in fp32."""
        return self.products * peak * factor + self.bias < EXACT


def rounded_sum(
    func: Callable[..., Any],
    x: Tensor,
    codes: Tensor,
    bias: Tensor | float,
    factor: int,
    largest: Largest,
    *rest: Any,
) -> Tensor:
    """``func(x, codes, None, *rest) * factor + bias`` in fp32, rounded once, as an int32 becomes fp32.

    In fp32 where nothing can leave what is exact in it, on the CPU; in two halves where those stay inside,
    so that only their last sum is rounded; else in fp64. On other devices always in fp64: their fp32 may
    be TF32, or Winograd's algorithm, which divides.

    Args:
        func: a convolution or ``linear``.
        x: whole numbers up to :data:`PEAK` in magnitude, fp32.
        codes: whole numbers, int8.
        bias: whole numbers in fp64, broadcasts against the result.
        factor: a power of two.
        largest: of ``codes`` and ``bias``.
        rest: further arguments.
    """
    exact = x.device.type == "cpu"
    single = bias.float() if isinstance(bias, Tensor) else bias
    found: Tensor
    if exact and largest.fits(PEAK, factor):
        found = func(x, codes.float(), None, *rest).mul_(factor).add_(single)
    elif exact and largest.fits(HALF, factor):
        high = torch.floor(x / HALF)
        upper, lower = (func(part, codes.float(), None, *rest) for part in (high, x - high * HALF))
        found = upper.mul_(HALF * factor).add_(lower.mul_(factor).add_(single))
    else:
        found = func(x.double(), codes.double(), None, *rest).mul_(factor).add_(bias).float()
    return found

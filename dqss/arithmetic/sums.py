"""Sums of products of whole numbers, exact whatever the order is that they are added in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EXACT = 2**24
"""Whole numbers up to here are exact in fp32, and so is every sum that never leaves them."""
PEAK = 255
"""Largest ``byte - zero``."""
HALF = 16
"""A byte is two halves of four bits, which are added up apart."""


def largest_sum(codes: Tensor) -> int:
    """The largest sum of magnitudes in one row of ``[C, ...]`` integers."""
    return int(codes.to(torch.int64).abs().flatten(1).sum(1).max()) if codes.numel() else 0


def exact(func: Callable[..., Any], x: Tensor, codes: Tensor, largest: int, *rest: Any) -> Tensor:
    """``func(x, codes, None, *rest)`` for a linear ``func``, exact.

    In fp32 where no partial sum can leave what is exact in it, on the CPU; in two halves where those stay
    inside; else in fp64. On other devices always in fp64: their fp32 may be TF32, or Winograd's algorithm,
    which divides.

    Args:
        func: a convolution or ``linear``.
        x: whole numbers up to :data:`PEAK` in magnitude, fp32.
        codes: whole numbers, int8.
        largest: of :func:`largest_sum`.
        rest: further arguments.

    Returns:
        fp64 whole numbers.
    """
    found: Tensor
    if x.device.type == "cpu" and largest * PEAK < EXACT:
        found = func(x, codes.float(), None, *rest).double()
    elif x.device.type == "cpu" and largest * HALF < EXACT:
        high = torch.floor(x / HALF)
        upper, lower = (func(part, codes.float(), None, *rest) for part in (high, x - high * HALF))
        found = upper.double() * HALF + lower.double()
    else:
        found = func(x.double(), codes.double(), None, *rest)
    return found

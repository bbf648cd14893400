"""Integers as digits whose products can be summed in fp32 without any rounding. Pure mathematics.

fp32 holds every whole number up to 2^24. A sum of products of whole numbers that can never leave that
range comes out the same in whatever order it is added, with or without fused multiply-adds. Where the
weights of a layer are too many or too large for that, they are written with smaller digits, each digit is
summed apart, and the sums are put together from the highest digit down.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dqss.arithmetic.sums import EXACT

DIGIT_BITS = (4, 2)
"""Widths of digits to try, where the whole does not fit."""


@dataclass(frozen=True)
class Digits:
    """Whole numbers as ``((d_0 * base) + d_1) * base + ...``.

    Attributes:
        base: a power of two.
        parts: the digits from the highest down, fp32 whole numbers in the shape of what they stand for;
            the first has a sign, the others are in ``[0, base)``.
    """

    base: int
    parts: tuple[Tensor, ...]

    def combine(self, sums: list[Tensor]) -> Tensor:
        """The sum of the whole from those of the digits; rounded only where it leaves 2^24."""
        total = sums[0]
        for each in sums[1:]:
            total = total * self.base + each
        return total


def digits_of(codes: Tensor, peak: int) -> Digits | None:
    """The fewest digits whose sums of products are exact; None where there are none.

    Args:
        codes: whole numbers ``[C, ...]``; a sum runs over all but the first axis.
        peak: largest magnitude of what they are multiplied with.
    """
    found = codes.to(torch.int64)
    if _largest(found) * peak < EXACT:
        return Digits(1, (found.float(),))
    for bits in DIGIT_BITS:
        parts = _split(found, bits)
        if all(_largest(part) * peak < EXACT for part in parts):
            return Digits(1 << bits, tuple(part.float() for part in parts))
    return None


def _split(codes: Tensor, bits: int) -> list[Tensor]:
    base, half = 1 << bits, 1 << (bits - 1)
    parts = list[Tensor]()
    while bool(((codes < -half) | (codes >= half)).any()):
        parts.insert(0, codes % base)
        codes = torch.div(codes, base, rounding_mode="floor")
    return [codes, *parts]


def _largest(codes: Tensor) -> int:
    return int(codes.abs().flatten(1).sum(1).max())

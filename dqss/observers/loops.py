"""The inner loops of calibration, eager and fused: see :mod:`dqss.fused`, which runs both."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from dqss.fused import Kernel

LANES = 16
"""Zeros are counted in so many places in turn: additions to one and the same would wait for each other."""


def _place(x: Tensor, inverse: Tensor, start: Tensor, offset: Tensor, zeros: Tensor) -> tuple[Tensor, ...]:
    # Dividing by a power of two and subtracting whole numbers below 2^24 are exact in fp32.
    number = (torch.floor(x * inverse[:, None]) - start[:, None]).to(torch.int32)
    lane = torch.arange(x.shape[1], device=x.device, dtype=torch.int32) & (LANES - 1)
    place = torch.where(x == 0, zeros[:, None] + lane, number + offset[:, None])
    return (place, *extremes(x))


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest value of each row of ``[C, n]``; NaN where there is one."""
    if x.shape[0] == 1:  # several times faster than along a dimension
        low, high = torch.aminmax(x)
        return low.reshape(1), high.reshape(1)
    found = torch.aminmax(x, dim=1)
    return found[0], found[1]


place = Kernel(_place)
"""Where each of ``[C, n]`` is counted, int32, and the extremes of each row.

Value ``x`` of channel c counts at ``offset[c] + floor(x * inverse[c]) - start[c]``, a zero at one of
the ``LANES`` places from ``zeros[c]`` on. All but ``x`` are ``[C]``; the last two are int32.
"""


def _errors(values: Tensor, counts: Tensor, scale: Tensor, low: Tensor, high: Tensor, order: float) -> Tensor:
    steps = torch.clamp(torch.round(values / scale[..., None]), low[..., None], high[..., None])
    error = (steps * scale[..., None] - values).abs()
    if order == 1:
        cost = error
    elif order == 2:
        cost = error * error
    elif order == 3:
        cost = error * error * error
    elif order == 4:
        cost = (error * error) * (error * error)
    else:
        cost = error.pow(order)
    return (cost * counts).sum(-1)


@cache
def errors(order: float) -> Kernel:
    """Sums of the powers of rounding errors, ``[G, C]``, for values and counts ``[C, n]``.

    The other three are ``[G, C]``: the scale, and both bounds of ``code - zero_point``.
    """

    def powers(values: Tensor, counts: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return _errors(values, counts, scale, low, high, order)

    return Kernel(powers)

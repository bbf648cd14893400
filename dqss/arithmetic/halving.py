"""Averages whose additions have an order: halves onto halves, as any runtime can do them.

The sum of real numbers in fp32 depends on who adds first, and a reduction leaves that open. Additions of
two tensors do not: filled up with zeros to a power of two of values, the second half is added to the
first until one is left.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dqss.arithmetic.points import is_global, with_axes
from dqss.products.meet import POOL, as_meeting


def next_power(count: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << (count - 1).bit_length()


def halved_mean(x: Tensor) -> Tensor:
    """The mean of ``[N, C, ...]`` over everything behind the channels, ``[N, C]``."""
    values = x.flatten(2)
    count = values.shape[2]
    values = F.pad(values, (0, next_power(count) - count))
    while values.shape[2] > 1:
        first, second = values.chunk(2, 2)
        values = first + second
    return values.squeeze(2) / count


class Halving(TorchFunctionMode):
    """Computes global averages so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        meeting = as_meeting(func, args, kwargs)
        if meeting is None or meeting.kind != POOL or not meeting.of_real_tensors() or not is_global(meeting):
            return func(*args, **kwargs)
        x: Tensor = meeting.given[0]
        return with_axes(halved_mean(x.float()).to(x.dtype), meeting)

"""Many independent chances at once, from the bytes of few random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LEVELS = 256
"""A byte decides, so that a chance is met to within half of 1/256; drawing a number for each takes longer
than the convolution that it is for."""


def chances(shape: Sequence[int], share: float, generator: torch.Generator) -> Tensor:
    """True with probability ``share`` (in steps of 1/256), bool ``shape``, where the generator is.

    Args:
        shape: of the result.
        share: from 0 to 1.
        generator: of the device that the chances are for: to copy them there takes longer than to draw them.
    """
    count, level = math.prod(shape), round(share * LEVELS)
    if level == 0:
        return torch.zeros(*shape, dtype=torch.bool, device=generator.device)
    words = torch.empty(-(-count // 8), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return (words.view(torch.uint8)[:count] <= level - 1).reshape(*shape)

"""Weights as the integers of a kernel, and the units of what it sums."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dqss.functional import broadcast_channels, dequantize, quantize
from dqss.spec import MAX_BITS, MIDDLE, QuantSpec

BIAS_LIMIT = 2**30
"""Units of an accumulator that a bias may be; as much again is left for the sum."""


def whole(scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, QuantSpec]:
    """The same values on a grid with a whole zero point, which is what integer arithmetic knows.

    Where the zero point is -1/2, the codes ``c`` become ``2 c + 1`` on half the step: the same real
    numbers to the bit, on one more bit.
    """
    if spec.mirrored and bool((zero_point == MIDDLE).all()) and spec.bits < MAX_BITS:
        return scale / 2, torch.zeros_like(zero_point), replace(spec, bits=spec.bits + 1)
    return scale, zero_point, spec


def least_scale(bias: Tensor, inputs: Tensor, shift: int) -> Tensor:
    """``[C]``: with a smaller scale of its weights a bias is more units than an accumulator counts to.

    Args:
        bias: ``[C]``.
        inputs: scale of what the weights are multiplied with, one value.
        shift: places by which codes stand higher in their type.
    """
    return bias.abs() * ((1 << shift) / BIAS_LIMIT) / inputs


def coarsen(weight: Tensor, scale: Tensor, least: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Double the scales of dead channels until none is below ``least``, and round their weights anew.

    A channel whose batch norm gave up on it has weights of next to nothing, a scale to match, and a
    bias of ordinary size. With ``least`` such that the bias is 2^30 units of the accumulator, a sum
    of n products moves by at most n 2^-22 of that bias (times 2^s where codes are shifted by s).

    Args:
        weight: on its grid.
        scale: ``[C]``.
        least: ``[C]`` or one value.
        spec: a symmetric grid.
    """
    doublings = torch.ceil(torch.log2(least / scale)).clamp(min=0)
    coarse = scale * 2**doublings
    step = broadcast_channels(coarse, weight.shape, spec.granularity)
    return dequantize(quantize(weight, step, torch.zeros(()), spec), step, torch.zeros(())), coarse


def whole_units(bias: Tensor, unit: Tensor) -> Tensor:
    """A bias in whole units of an accumulator, as integers in fp64.

    Args:
        bias: ``[C]``.
        unit: fp32, one value or ``[C]``.
    """
    return torch.round(bias.double() / unit.double())

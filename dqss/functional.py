"""Pure tensor mathematics of quantization: grids, rounding with a straight-through gradient.

Shapes: ``x`` has any shape. ``scale`` and ``zero_point`` are float tensors that broadcast
against ``x``; :func:`broadcast_channels` shapes a vector of C values for that.
``scale`` is in real units per integer step; ``zero_point`` is an integer held as a float.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dqss.spec import Granularity, PerChannel, QuantSpec


def channel_count(shape: torch.Size, granularity: Granularity) -> int:
    """Number of scales that a tensor of ``shape`` has at ``granularity``."""
    return shape[granularity.axis] if isinstance(granularity, PerChannel) else 1


def broadcast_channels(values: Tensor, ndim: int, granularity: Granularity) -> Tensor:
    """Reshape a vector of C values so that it broadcasts against an ``ndim``-dimensional tensor."""
    if not isinstance(granularity, PerChannel) or ndim == 0:
        return values.reshape(())
    shape = [1] * ndim
    shape[granularity.axis] = -1
    return values.reshape(shape)


def channel_view(x: Tensor, granularity: Granularity) -> Tensor:
    """View ``x`` as ``[C, n]``: one row for each scale."""
    if isinstance(granularity, PerChannel):
        return x.movedim(granularity.axis, 0).flatten(1) if x.ndim > 1 else x.reshape(-1, 1)
    return x.reshape(1, -1)


def choose_qparams(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Turn clip ranges into quantization parameters.

    Args:
        low, high: ``[C]`` ends of the clip range in real units. The range is widened to
            contain zero, so that zero (padding, ReLU) is always exact.
        spec: the grid.

    Returns:
        ``scale`` ``[C]`` fp32, positive, and ``zero_point`` ``[C]`` fp32 with integer values in
        ``[qmin, qmax]``. An empty range (an all-zero channel) gets scale 1.
    """
    low = low.to(torch.float32).clamp(max=0.0)
    high = high.to(torch.float32).clamp(min=0.0)
    if spec.symmetric:
        scale = torch.maximum(-low, high) / spec.qmax
    else:
        scale = (high - low) / (spec.qmax - spec.qmin)
    usable = scale > torch.finfo(torch.float32).tiny
    scale = torch.where(usable, scale, torch.ones_like(scale))
    if spec.symmetric:
        return scale, torch.zeros_like(scale)
    zero_point = (spec.qmin - torch.round(low / scale)).clamp(spec.qmin, spec.qmax)
    return scale, zero_point


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Integer codes of ``x``, as floats: ``clamp(round(x / scale) + zero_point, qmin, qmax)``."""
    codes = torch.round(x.to(torch.float32) / scale)
    return torch.clamp(codes + zero_point, spec.qmin, spec.qmax)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Real values of integer codes: ``(codes - zero_point) * scale``."""
    return (codes - zero_point) * scale


class _FakeQuantize(torch.autograd.Function):
    """Quantize-dequantize; the gradient passes where the code was not clipped (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
        unclipped = torch.round(x.to(torch.float32) / scale) + zero_point
        codes = unclipped.clamp(spec.qmin, spec.qmax)
        ctx.save_for_backward(unclipped == codes)
        return dequantize(codes, scale, zero_point).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (inside,) = ctx.saved_tensors
        return grad_outputs[0] * inside, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Round ``x`` to its grid and back, with the straight-through gradient inside the clip range.

    Parameters are constants here; algorithms that learn them bring their own gradient.
    """
    result: Tensor = _FakeQuantize.apply(x, scale, zero_point, spec)
    return result

"""Pure tensor mathematics of quantization: grids, rounding with a straight-through gradient.

Shapes: ``x`` has any shape. ``scale`` and ``zero_point`` are float tensors that broadcast
against ``x``; :func:`broadcast_channels` shapes a vector of C values for that.
``scale`` is in real units per integer step; ``zero_point`` is an integer held as a float.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dqss.spec import Granularity, PerChannel, PerGroup, PerTensor, QuantSpec


def channel_count(shape: Sequence[int], granularity: Granularity) -> int:
    """Number of scales that a tensor of ``shape`` has at ``granularity``."""
    if isinstance(granularity, PerTensor):
        return 1
    channels = shape[granularity.axis]
    return channels * _groups(shape, granularity)[0] if isinstance(granularity, PerGroup) else channels


def broadcast_channels(values: Tensor, shape: Sequence[int], granularity: Granularity) -> Tensor:
    """A vector of C values so that it broadcasts against a tensor of ``shape``.

    For groups, which follow no axis, that is a tensor of the very shape.
    """
    if isinstance(granularity, PerTensor) or not shape:
        return values.reshape(())
    if isinstance(granularity, PerGroup):
        rows = values[:, None].expand(-1, _groups(shape, granularity)[1])
        return from_channel_view(rows, shape, granularity)
    wide = [1] * len(shape)
    wide[granularity.axis] = -1
    return values.reshape(wide)


def channel_view(x: Tensor, granularity: Granularity, fill: float | None = None) -> Tensor:
    """View ``x`` as ``[C, n]``: one row for each scale.

    A short last group is filled up with its last value, or with ``fill``; the result is then a copy.
    """
    if isinstance(granularity, PerTensor):
        return x.reshape(1, -1)
    # A view costs as much as a small loop.
    first = x if granularity.axis == 0 else x.movedim(granularity.axis, 0)
    rows = first.flatten(1) if x.ndim > 1 else x.reshape(-1, 1)
    if isinstance(granularity, PerGroup):
        count, size = _groups(x.shape, granularity)
        missing = count * size - rows.shape[1]
        if missing:
            last = rows[:, -1:] if fill is None else torch.full_like(rows[:, -1:], fill)
            rows = torch.cat([rows, last.expand(-1, missing)], dim=1)
        rows = rows.reshape(-1, size)
    return rows


def from_channel_view(rows: Tensor, shape: Sequence[int], granularity: Granularity) -> Tensor:
    """Undo :func:`channel_view`: ``[C, n]`` back in ``shape``, contiguous."""
    if isinstance(granularity, PerTensor):
        return rows.reshape(shape)
    if isinstance(granularity, PerGroup):
        rows = rows.reshape(shape[granularity.axis], -1)[:, : _inner(shape, granularity)]
    axis = granularity.axis % len(shape)
    if axis == 0:
        return rows.reshape(shape).contiguous()
    rest = [size for position, size in enumerate(shape) if position != axis]
    return rows.reshape(shape[axis], *rest).movedim(0, axis).contiguous()


def common_granularity(granularities: Iterable[Granularity]) -> Granularity:
    """The coarsest granularity that each of ``granularities`` is a coarser form of.

    Raises:
        ValueError: where channels lie along different axes.
    """
    finer = [g for g in dict.fromkeys(granularities) if not isinstance(g, PerTensor)]
    if not finer:
        return PerTensor()
    if len({g.axis for g in finer}) > 1:
        raise ValueError(f"channels along different axes: {finer}")
    sizes = [g.size for g in finer if isinstance(g, PerGroup)]
    return PerGroup(math.gcd(*sizes), finer[0].axis) if sizes else finer[0]


def refine_channels(values: Tensor, shape: Sequence[int], own: Granularity, common: Granularity) -> Tensor:
    """A vector with a value for each channel of ``own``, repeated for each channel of ``common``."""
    if own == common:
        return values
    if isinstance(own, PerTensor):
        return values.expand(channel_count(shape, common))
    assert isinstance(common, PerGroup)
    count, size = _groups(shape, common)
    begin = torch.arange(count, device=values.device) * size
    group = begin // own.size if isinstance(own, PerGroup) else torch.zeros_like(begin)
    return values.reshape(shape[own.axis], -1)[:, group].reshape(-1)


def _inner(shape: Sequence[int], granularity: PerChannel | PerGroup) -> int:
    """How many values there are at each index of the channel axis."""
    return math.prod(shape) // shape[granularity.axis]


def _groups(shape: Sequence[int], granularity: PerGroup) -> tuple[int, int]:
    """Number of groups of each channel and their size, which is never more than there is."""
    inner = _inner(shape, granularity)
    size = min(granularity.size, inner)
    return -(-inner // size), size


def choose_qparams(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Turn clip ranges into quantization parameters.

    Args:
        low, high: ``[C]`` ends of the clip range in real units. The range is widened to
            contain zero, so that zero (padding, ReLU) is always exact. Unsigned symmetric
            grids do not reach below it, whatever ``low`` is.
        spec: the grid.

    Returns:
        ``scale`` ``[C]`` fp32, positive, and ``zero_point`` ``[C]`` fp32 with integer values in
        ``[qmin, qmax]``. An empty range (an all-zero channel) gets scale 1.
    """
    low = low.to(torch.float32).clamp(max=0.0)
    high = high.to(torch.float32).clamp(min=0.0)
    if spec.mirrored:
        scale = torch.maximum(-low, high) / spec.qmax
    elif spec.symmetric:
        scale = high / spec.qmax
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

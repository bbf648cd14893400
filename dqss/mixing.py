"""The mixtures of the efficient convolution: many quantizations of one tensor, one result.

    A_mix = sum_k alpha_k R_k(A)        W_mix = sum_k beta_k Q_k(W)

Both keep nothing K-fold for the backward pass: it recomputes each quantization from its
input. ``dL/dalpha_k = <dL/dA_mix, R_k(A)>``; the gradient of ``A`` passes straight through
each candidate inside its own clip range, weighted by ``alpha_k``. (arXiv 2404.08010)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dqss import fused
from dqss.functional import dequantize, fake_quantize
from dqss.spec import QuantSpec


@dataclass(frozen=True)
class Grid:
    """One candidate's grid, ready to use: parameters broadcast against the tensor.

    Attributes:
        scale, zero_point: fp32, broadcastable against the tensor, more than one value along at
            most one axis.
        spec: integer bounds.
    """

    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec

    def rows(self, channels: int) -> list[Tensor]:
        """Scale and both bounds of ``code - zero_point``, each ``[channels]``."""
        parts = (self.scale, self.spec.qmin - self.zero_point, self.spec.qmax - self.zero_point)
        return [part.reshape(-1).expand(channels) for part in parts]


class _MixFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, grids: Sequence[Grid]) -> Tensor:
        axis, channels = _channel_axis(grids)
        stacked = [torch.stack(rows) for rows in zip(*(grid.rows(channels) for grid in grids), strict=True)]
        ctx.save_for_backward(x, weights, *stacked)
        ctx.axis = axis
        mixed = fused.mix(x.numel(), _blocks(x, axis), weights, *stacked)
        result: Tensor = mixed.reshape(x.shape).to(x.dtype)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, weights, *stacked = ctx.saved_tensors
        grad = _blocks(grad_outputs[0], ctx.axis)
        passed, sums = fused.mix_backward(x.numel(), _blocks(x, ctx.axis), grad, weights, *stacked)
        return passed.reshape(x.shape).to(x.dtype), sums, None


def mix_fake_quantize(x: Tensor, weights: Tensor, grids: Sequence[Grid]) -> Tensor:
    """``sum_k weights[k] * fake_quantize(x, grids[k])`` for grids that do not learn.

    Args:
        x: any shape; bf16 and fp16 are mixed in fp32 and returned in their own type.
        weights: ``[K]`` fp32.
        grids: K grids.

    Returns:
        A tensor like ``x``. A one-hot ``weights`` gives exactly that candidate, in value and in
        the gradient of ``x``.
    """
    result: Tensor = _MixFakeQuantize.apply(x, weights, tuple(grids))
    return result


def mix_fake_quantize_reference(x: Tensor, weights: Tensor, grids: Sequence[Grid]) -> Tensor:
    """The same as :func:`mix_fake_quantize`, written as the sum that it is; for tests."""
    parts = [fake_quantize(x, grid.scale, grid.zero_point, grid.spec) for grid in grids]
    return (weights.reshape(-1, *[1] * x.ndim) * torch.stack(parts)).sum(0)


@dataclass(frozen=True)
class Codes:
    """A quantized weight at rest: integers (one byte each up to 8 bits), scale, zero point."""

    integers: Tensor
    scale: Tensor
    zero_point: Tensor

    @classmethod
    def pack(cls, codes: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Codes:
        """Store float-valued ``codes`` in the smallest integer type that holds them."""
        if spec.bits > 8:
            return cls(codes.to(torch.int32), scale, zero_point)
        return cls(codes.to(torch.int8 if spec.qmin < 0 else torch.uint8), scale, zero_point)

    def dequantize(self) -> Tensor:
        """Real values, fp32, bit for bit those of ``fake_quantize``."""
        return dequantize(self.integers.to(torch.float32), self.scale, self.zero_point)


@dataclass(frozen=True)
class CodeStack:
    """All candidates' codes of one weight, channels first, for mixing in one pass.

    Attributes:
        steps: ``[K, C, n]``, ``code - zero_point`` in the smallest integer type for all.
        scale: ``[K, C]`` fp32.
        shape: of the weight; ``axis`` is its channel axis, 0 where C is 1.
    """

    steps: Tensor
    scale: Tensor
    shape: torch.Size
    axis: int

    @classmethod
    def of(cls, codes: Sequence[Codes]) -> CodeStack:
        """Stack the codes of K candidates."""
        shape = codes[0].integers.shape
        axis, channels = _channel_axis(codes)
        axis = 0 if axis is None else axis % len(shape)
        rows = []
        for code in codes:
            steps = code.integers.to(torch.int32) - code.zero_point.to(torch.int32)
            rows.append(steps.movedim(axis, 0).reshape(channels, -1))
        largest = max(int(row.abs().max()) for row in rows)
        kind = torch.int8 if largest < 128 else torch.int16 if largest < 32768 else torch.int32
        scale = torch.stack([code.scale.reshape(-1).expand(channels) for code in codes])
        return cls(torch.stack(rows).to(kind), scale, shape, axis)

    def choose(self, index: int) -> Tensor:
        """The weight of one candidate, bit for bit ``codes[index].dequantize()``."""
        return self.restore(self.steps[index].to(torch.float32) * self.scale[index][:, None])

    def restore(self, rows: Tensor) -> Tensor:
        """``[C, n]`` back in the shape of the weight."""
        rest = [size for position, size in enumerate(self.shape) if position != self.axis]
        if rows.shape[0] == 1:
            return rows.reshape(self.shape)
        return rows.reshape(rows.shape[0], *rest).movedim(0, self.axis).contiguous()

    def rows(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as contiguous fp32 ``[C, n]``."""
        moved = weight.to(torch.float32)
        if self.scale.shape[1] > 1:
            moved = moved.movedim(self.axis, 0)
        return moved.reshape(self.scale.shape[1], -1)

    def to(self, move: Any) -> CodeStack:
        """The same with ``move`` applied to its tensors."""
        return CodeStack(move(self.steps), move(self.scale), self.shape, self.axis)


class _MixCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, stack: CodeStack) -> Tensor:
        ctx.stack = stack
        return stack.restore(fused.mix_codes(stack.steps[0].numel(), weights, stack.scale, stack.steps))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        stack: CodeStack = ctx.stack
        grad = stack.rows(grad_outputs[0])
        return fused.mix_codes_backward(grad.numel(), grad, stack.scale, stack.steps), None


def mix_codes(weights: Tensor, codes: CodeStack | Sequence[Codes]) -> Tensor:
    """``sum_k weights[k] * codes[k].dequantize()`` for a frozen weight; fp32, shape of the weight."""
    stack = codes if isinstance(codes, CodeStack) else CodeStack.of(codes)
    result: Tensor = _MixCodes.apply(weights, stack)
    return result


def _channel_axis(parts: Sequence[Grid] | Sequence[Codes]) -> tuple[int | None, int]:
    """The one axis (negative) along which any scale varies, and its size; (None, 1) if none does."""
    for part in parts:
        for axis, size in enumerate(part.scale.shape):
            if size > 1:
                return axis - part.scale.ndim, size
    return None, 1


def _blocks(x: Tensor, axis: int | None) -> Tensor:
    """``x`` as contiguous fp32 ``[A, C, B]`` with its channel axis in the middle."""
    x = x.detach().to(torch.float32).contiguous()
    if axis is None:
        return x.reshape(1, 1, -1)
    position = axis % x.ndim
    return x.reshape(x.shape[:position].numel(), x.shape[position], x.shape[position + 1 :].numel())

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

from dqss.functional import dequantize, fake_quantize
from dqss.spec import QuantSpec


@dataclass(frozen=True)
class Grid:
    """One candidate's grid, ready to use: parameters broadcast against the tensor.

    Attributes:
        scale, zero_point: fp32, broadcastable against the tensor.
        spec: integer bounds.
    """

    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Bounds of ``code - zero_point``, broadcastable like the scale."""
        return self.spec.qmin - self.zero_point, self.spec.qmax - self.zero_point


class _MixFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, grids: Sequence[Grid]) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.grids = grids
        x32 = x.to(torch.float32)
        mixed = torch.zeros_like(x32)
        for weight, grid in zip(weights.tolist(), grids, strict=True):
            if weight != 0.0:
                steps = torch.round(x32 / grid.scale).clamp_(*grid.bounds())
                mixed.addcmul_(steps, grid.scale, value=weight)
        return mixed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        x, weights = ctx.saved_tensors
        grad = grad_outputs[0].to(torch.float32)
        x32 = x.to(torch.float32)
        passed = torch.zeros_like(grad)
        grad_weights = []
        for weight, grid in zip(weights.tolist(), ctx.grids, strict=True):
            steps = torch.round(x32 / grid.scale)
            clipped = steps.clamp(*grid.bounds())
            if weight != 0.0:
                passed.add_((steps == clipped).to(grad.dtype), alpha=weight)
            grad_weights.append(torch.dot((clipped.mul_(grid.scale)).flatten(), grad.flatten()))
        return passed.mul_(grad).to(x.dtype), torch.stack(grad_weights), None


def mix_fake_quantize(x: Tensor, weights: Tensor, grids: Sequence[Grid]) -> Tensor:
    """``sum_k weights[k] * fake_quantize(x, grids[k])`` for grids that do not learn.

    Args:
        x: any shape; bf16 and fp16 are mixed in fp32 and returned in their own type.
        weights: ``[K]`` fp32; candidates of weight exactly 0 cost nothing forward.
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


class _MixCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, codes: Sequence[Codes]) -> Tensor:
        ctx.codes = codes
        mixed = torch.zeros(codes[0].integers.shape, device=weights.device)
        for weight, code in zip(weights.tolist(), codes, strict=True):
            if weight != 0.0:
                mixed.add_(code.dequantize(), alpha=weight)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad = grad_outputs[0].to(torch.float32).flatten()
        return torch.stack([torch.dot(code.dequantize().flatten(), grad) for code in ctx.codes]), None


def mix_codes(weights: Tensor, codes: Sequence[Codes]) -> Tensor:
    """``sum_k weights[k] * codes[k].dequantize()`` for a frozen weight; fp32, shape of the weight."""
    result: Tensor = _MixCodes.apply(weights, tuple(codes))
    return result

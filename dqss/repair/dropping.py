"""Activation quantizers while a block is reconstructed: dropped at random, with a step that may learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dqss.quantizers import Quantizer
from dqss.repair.chance import chances


class _Round(torch.autograd.Function):
    """Rounding whose gradient passes straight through (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: object, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


class DroppingQuantizer(nn.Module):
    """Quantizes each value with a chance, and leaves it in float otherwise (QDrop, arXiv 2203.05740).

    The step learns as its logarithm relative to where it began, so that one learning rate suits all;
    its gradient is that of LSQ (arXiv 1902.08153).

    Args:
        quantizer: that is in the layer; it stays as it is.
        drop: chance of a value to stay in float.
        learn: whether the step learns.
        generator: of the chances; where the inputs are.

    Attributes:
        shift: ``[C]``, the logarithm of the step over the quantizer's own.
    """

    def __init__(self, quantizer: Quantizer, drop: float, learn: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.quantizer, self.drop, self.learn, self.generator = quantizer, drop, learn, generator
        self.shift = nn.Parameter(torch.zeros_like(quantizer.grid().scale), requires_grad=learn)

    def scale(self) -> Tensor:
        """``[C]``: the step as it stands."""
        return self.quantizer.grid().scale * self.shift.exp()

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` where chance says so."""
        if self.drop >= 1 or not x.is_floating_point():
            return x
        quantized: Tensor = self._learned(x) if self.learn else self.quantizer(x)
        if self.drop <= 0:
            return quantized
        return torch.where(chances(x.shape, self.drop, self.generator), x, quantized)

    def _learned(self, x: Tensor) -> Tensor:
        grid = self.quantizer.grid()
        spec = grid.spec
        scale, zero_point = type(grid)(self.scale(), grid.zero_point, spec).shaped(x.shape)
        rounded: Tensor = _Round.apply(x.to(torch.float32) / scale)
        unclipped = rounded + zero_point
        inside = (unclipped >= spec.qmin) & (unclipped <= spec.qmax)
        # Not clamp: its gradient stops at the outermost codes already.
        codes = torch.where(inside, unclipped, unclipped.detach().clamp(spec.qmin, spec.qmax))
        return ((codes - zero_point) * scale).to(x.dtype)

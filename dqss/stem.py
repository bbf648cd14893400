"""A faster gradient for the input of strided convolutions over few channels, on CPUs.

A training step never needs the gradient of the images; the search does, since what their candidates
do to the loss is the inner product with it. CPU libraries compute it for blocks of sixteen channels
or so: of a ResNet's first layer it took a tenth of the whole step. Each residue of the position
modulo the stride is a convolution of stride 1 of its own, with every s-th weight; all of them
together are one convolution with s x s as many channels, and a pixel shuffle.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW = 4
"""Channels at most: with more the library's way is the faster one."""


def hasten(layer: nn.Module) -> None:
    """Use the faster gradient in ``layer`` where it is one for which that pays."""
    if isinstance(layer, nn.Conv2d) and fits(layer):
        # Beside the method of its class, which goes on padding as ever.
        forward = partial(_forward, layer.stride[0], layer.padding)  # type: ignore[arg-type]
        layer._conv_forward = forward  # type: ignore[method-assign]


def fits(layer: nn.Conv2d) -> bool:
    """Whether the gradient of the input is faster here."""
    stride = layer.stride[0]
    return (
        type(layer)._conv_forward is nn.Conv2d._conv_forward
        and layer.groups == 1
        and layer.in_channels <= FEW
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and layer.stride == (stride, stride)
        and stride > 1
        and layer.dilation == (1, 1)
    )


def _forward(stride: int, padding: tuple[int, int], x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.ndim == 4 and x.requires_grad and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        found: Tensor = _StridedConvolution.apply(x, weight, bias, stride, padding)
        return found
    return F.conv2d(x, weight, bias, stride, padding)


class _StridedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        of_x, *others = ctx.needs_input_grad[:3]
        rest = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            [weight.shape[0]] if others[1] else None,
            (ctx.stride, ctx.stride),
            ctx.padding,
            (1, 1),
            False,
            (0, 0),
            1,
            (False, *others),
        )
        grad_x = input_gradient(grad, weight, x.shape, ctx.stride, ctx.padding) if of_x else None
        return grad_x, rest[1], rest[2], None, None


def input_gradient(
    grad: Tensor, weight: Tensor, shape: torch.Size, stride: int, padding: tuple[int, int]
) -> Tensor:
    """Gradient of the input of ``conv2d``.

    Args:
        grad: of the output, ``[N, O, H', W']``.
        weight: ``[O, I, h, w]``.
        shape: of the input, ``[N, I, H, W]``.
        stride, padding: of the convolution.
    """
    out, channels, *size = weight.shape
    taps = [-(-length // stride) for length in size]  # of each residue, padded with zeros to be alike
    padded = F.pad(weight, (0, taps[1] * stride - size[1], 0, taps[0] * stride - size[0]))
    # Position stride * q + r meets tap stride * m + r at output q - m.
    phases = padded.view(out, channels, taps[0], stride, taps[1], stride).permute(1, 3, 5, 0, 2, 4)
    phases = phases.reshape(channels * stride * stride, out, *taps).flip(2, 3)
    parts = F.conv2d(grad, phases, padding=(taps[0] - 1, taps[1] - 1))
    full = F.pixel_shuffle(parts, stride)
    # Positions beyond the last window have no gradient.
    lack = [max(0, shape[d] + 2 * padding[d - 2] - full.shape[d]) for d in (2, 3)]
    full = F.pad(full, (0, lack[1], 0, lack[0]))
    top, left = padding
    return full[:, :, top : top + shape[2], left : left + shape[3]]

"""A layer computed from integers: its own function on codes, a bias in whole units, one scaling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.arithmetic.numbers import Bytes
from dqss.arithmetic.sums import Largest, rounded_sum
from dqss.arithmetic.weights import coarsen, least_scale, whole, whole_units
from dqss.mixing import Grid
from dqss.precision import KeepsPrecision

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


class LayerKernel(KeepsPrecision):
    """What an integer kernel makes of the input of a layer.

    Args:
        codes: integers of the weight, int8, channels first.
        inputs: grid of the layer's input.
        unit: what one unit of the sum stands for, fp32, one value or ``[C]``.
        bias: in these units, fp64 whole numbers ``[C]``; None without one.
        shift: places by which the stored codes stand higher than ``codes``.
        output: grid of what reads the result; None for real numbers.
    """

    def __init__(
        self,
        codes: Tensor,
        inputs: Bytes,
        unit: Tensor,
        bias: Tensor | None,
        shift: int,
        output: Bytes | None,
    ) -> None:
        super().__init__()
        self.shift, self.largest, self.real = shift, Largest.of(codes, bias), output is None
        target = inputs if output is None else output
        buffers = {
            "codes": codes,
            "input_scale": inputs.scale,
            "input_zero": inputs.zero,
            "unit": unit,
            "bias": bias,
            "output_scale": target.scale,
            "output_zero": target.zero,
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    codes: Tensor
    input_scale: Tensor
    input_zero: Tensor
    unit: Tensor
    bias: Tensor | None
    output_scale: Tensor
    output_zero: Tensor

    def computes(self, func: Any, x: Tensor) -> bool:
        """Whether a call of a torch function is what the kernel is for."""
        # A linear layer is a matrix product and an addition in real numbers where it has more axes.
        return func in CONVOLUTIONS or (func is F.linear and x.ndim == 2)

    def forward(self, func: Any, x: Tensor, *rest: Any) -> Tensor:
        """The layer's output for ``x`` on its grid; ``rest`` goes to ``func`` after the bias."""
        inputs = Bytes(self.input_scale, self.input_zero)
        axis = -1 if func is F.linear else -(self.codes.ndim - 1)
        bias = 0.0 if self.bias is None else along(self.bias, axis)
        factor, codes = 1 << self.shift, inputs.read(x.float())
        total = rounded_sum(func, codes, self.codes, bias, factor, self.largest, *rest)
        if self.real:
            return (total * along(self.unit, axis)).to(x.dtype)
        output = Bytes(self.output_scale, self.output_zero)
        return output.requantize(total, along(self.unit / self.output_scale, axis)).to(x.dtype)


def along(values: Tensor, axis: int) -> Tensor:
    """Broadcasts against a tensor whose channel axis is ``axis``, counted from the end."""
    return values.reshape(-1, *[1] * (-axis - 1)) if values.numel() > 1 else values.reshape(())


def make_kernel(
    layer: nn.Module, weight: Grid, inputs: Grid, output: Grid | None, weight_bits: int
) -> LayerKernel | None:
    """The kernel of a layer, whose weight and bias become what a file stores; None where there is none.

    Args:
        layer: a convolution or linear layer whose weight holds its quantized values.
        weight, inputs: grids.
        output: of what reads the result; a convolution without one is no integer kernel.
        weight_bits: of the type that weights are stored in.
    """
    scale, zero_point, spec = whole(weight.scale, weight.zero_point, weight.spec)
    values: Tensor = layer.weight.detach()  # type: ignore[operator]
    # Those of linear layers may give real numbers.
    kinds = (nn.Linear,) if output is None else (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    shift = weight_bits - spec.bits
    if (
        not isinstance(layer, kinds)
        or not spec.mirrored
        or shift < 0
        or scale.numel() not in (1, len(values))
    ):
        return None
    least = _least(layer, inputs, shift)
    if bool((scale < least).any()) and scale.numel() > 1:
        values, scale = coarsen(values, scale, least, spec)
    shaped = Grid(scale, zero_point, spec).shaped(values.shape)[0]
    codes, unit = torch.round(values / shaped), inputs.scale * (scale / (1 << shift))
    if bool((scale < least).any()) or not torch.equal(codes * shaped, values) or not bool((unit > 0).all()):
        return None
    layer.weight = nn.Parameter(values, requires_grad=False)
    bias = _round_bias(layer, unit)
    given = None if output is None else Bytes.of(output)
    return LayerKernel(codes.to(torch.int8), Bytes.of(inputs), unit, bias, shift, given)


def _least(layer: nn.Module, inputs: Grid, shift: int) -> Tensor:
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    return torch.zeros_like(inputs.scale) if bias is None else least_scale(bias.detach(), inputs.scale, shift)


def _round_bias(layer: nn.Module, unit: Tensor) -> Tensor | None:
    """The bias in whole units; the layer's own becomes the real numbers that they stand for."""
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    if bias is None:
        return None
    rounded = whole_units(bias.detach(), unit).float() * unit
    layer.bias = nn.Parameter(rounded, requires_grad=False)
    # What a file makes of them: beyond 2^24 not every whole number is one of fp32.
    return whole_units(rounded, unit)

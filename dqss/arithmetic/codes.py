"""A layer computed on codes held in fp32: a sum without roundings, then one multiplication, one addition.

``sum(a_i w_i)`` with ``a_i = s_a p_i`` and ``w_i = s_w q_i`` is ``s_a s_w sum(p_i q_i)`` (arXiv 1712.05877,
section 2.2). The sum of whole numbers is the same in every order (:mod:`dqss.arithmetic.digits`), and what
follows it is elementwise, each operation rounded once as IEEE 754 says: whoever computes that, computes
these bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.arithmetic.digits import Digits, digits_of
from dqss.arithmetic.kernels import CONVOLUTIONS, along
from dqss.arithmetic.weights import whole
from dqss.mixing import Grid
from dqss.precision import KeepsPrecision
from dqss.spec import PerChannel, PerTensor, QuantSpec


@dataclass(frozen=True)
class CodeSum:
    """What a layer sums, and what one unit of that is worth.

    Attributes:
        digits: of the weight's ``code - zero_point``.
        zero: the zero points, fp32; broadcasts against the weight.
        spec: whose codes they are.
        unit: fp32 ``[C]``.
    """

    digits: Digits
    zero: Tensor
    spec: QuantSpec
    unit: Tensor


def code_sum(weight: Tensor, grid: Grid, inputs: Grid) -> CodeSum | None:
    """Of a layer with ``weight`` on ``grid`` that reads ``inputs``; None where it has no exact sum.

    Args:
        weight: fp32 ``[C, ...]``, its channels first.
        grid: that every value of it is on, to the bit.
        inputs: of what it is multiplied with.
    """
    scale, zero_point, spec = whole(grid.scale, grid.zero_point, grid.spec)
    grain = spec.granularity
    by_channel = isinstance(grain, PerChannel) and grain.axis % weight.ndim == 0
    if not (by_channel or isinstance(grain, PerTensor)) or not isinstance(inputs.spec.granularity, PerTensor):
        return None
    peak = torch.maximum(inputs.spec.qmax - inputs.zero_point, inputs.zero_point - inputs.spec.qmin).max()
    step, zero = Grid(scale, zero_point, spec).shaped(weight.shape)
    codes, unit = torch.round(weight / step), (inputs.scale * scale).expand(len(weight))
    on_grid = torch.equal(codes * step, weight) and float(peak).is_integer()
    # Below that some runtimes take everything for zero.
    if not on_grid or bool((unit < torch.finfo(torch.float32).tiny).any()):
        return None
    digits = digits_of(codes, int(peak))
    return None if digits is None else CodeSum(digits, zero, spec, unit)


class CodeKernel(KeepsPrecision):
    """What a layer makes of an input on its grid.

    Args:
        total: of the layer.
        scale: of its input, one value.
        bias: fp32 ``[C]``; None without one.
    """

    def __init__(self, total: CodeSum, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.base, self.count = total.digits.base, len(total.digits.parts)
        buffers = {"scale": scale.reshape(()), "unit": total.unit.clone(), "bias": bias}
        buffers |= {f"part{n}": part for n, part in enumerate(total.digits.parts)}
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=False)

    scale: Tensor
    unit: Tensor
    bias: Tensor | None

    def computes(self, func: Any, x: Tensor) -> bool:
        """Whether a call of a torch function is what the kernel is for."""
        return func in CONVOLUTIONS or func is F.linear

    def forward(self, func: Any, x: Tensor, *rest: Any) -> Tensor:
        """The layer's output for ``x`` on its grid; ``rest`` goes to ``func`` after the bias."""
        parts = tuple(getattr(self, f"part{n}") for n in range(self.count))
        codes = (x.float() / self.scale).round_()
        # Other devices may have TF32 for fp32, or Winograd's algorithm, which divides.
        kind = torch.float32 if x.device.type == "cpu" else torch.float64
        sums = [func(codes.to(kind), part.to(kind), None, *rest).float() for part in parts]
        axis = -1 if func is F.linear else -(parts[0].ndim - 1)
        total = Digits(self.base, parts).combine(sums) * along(self.unit, axis)
        if self.bias is not None:
            total = total + along(self.bias, axis)
        return total.to(x.dtype)


def make_code_kernel(layer: nn.Module, weight: Grid, inputs: Grid) -> CodeKernel | None:
    """The kernel of a layer whose weight holds its quantized values; None where there is none."""
    if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None
    total = code_sum(layer.weight.detach().float(), weight, inputs)
    bias = None if layer.bias is None else layer.bias.detach().float()
    return None if total is None else CodeKernel(total, inputs.scale, bias)

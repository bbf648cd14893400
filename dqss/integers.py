"""Drawn options of 8 bits are multiplied as the integers that they are, on CPUs that can.

Where one option of a layer's input and one of its weight are drawn, the layer sums products of codes.
A CPU with instructions for that (VNNI) does so several times as fast as with the floats that codes stand
for, and what comes out is the same to the rounding of fp32, since sums of integers are exact:

    sum_i (s_x (c_i - z)) (s_w w_i)  =  s_x s_w  sum_i (c_i - z) w_i

The way back is that of floats: the input's quantization and the weight are made again from what the
layer read (see :mod:`dqss.remaking`), and one function has both quantizers' gradients. Only steps of a
search come here. What is measured or exported is quantized and multiplied as everywhere else.

``DQSS_INTEGERS=0`` in the environment leaves everything in floats.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dqss import fused, stem
from dqss.attach import INPUT_QUANTIZER
from dqss.decision import Decision, Sampled, StraightThroughGumbel
from dqss.mixed import MixedActivation, MixedWeight, Mode
from dqss.mixing import ByteGrid, ByteWeight, CodeStack, GridStack, as_blocks, drawn_gradients, on_grid
from dqss.spec import PerTensor

POSITIONS = 1024
"""Outputs of a channel at least, in a batch: a weight's codes are put in order for each pass."""
DEPTH = 192
"""Products in a sum at least: what is left to do for each output is as much as with floats."""
PRODUCTS = 1 << 25
"""In a layer at least: with fewer, most of the time goes to what is around them."""
TURNED = 4
"""Times as many where outputs have to be turned round, see :func:`_channels_first`."""
_DRAWN = (Sampled, StraightThroughGumbel)


class Geometry(ABC):
    """What a kind of layer does with codes, and with gradients."""

    turned: ClassVar[bool]
    """Whether the library's outputs have another layout than the layer's."""

    @abstractmethod
    def sizes(self, x: torch.Size, weight: torch.Size) -> tuple[int, int]:
        """Outputs of a channel, and products in each; none for inputs that it does not know."""

    @abstractmethod
    def multiply(self, x: Tensor, grid: ByteGrid, weight: ByteWeight, bias: Tensor | None) -> Tensor:
        """The layer's output.

        Args:
            x: the input.
            grid: of its codes.
            weight: its codes.
            bias: ``[O]``.
        """

    @abstractmethod
    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Of the input and of the weight, both as floats, from that of the output."""


@dataclass(frozen=True)
class Rows(Geometry):
    """Of ``nn.Linear``."""

    turned: ClassVar[bool] = False

    def sizes(self, x: torch.Size, weight: torch.Size) -> tuple[int, int]:
        """See :meth:`Geometry.sizes`."""
        return x.numel() // max(x[-1], 1), weight[1]

    def multiply(self, x: Tensor, grid: ByteGrid, weight: ByteWeight, bias: Tensor | None) -> Tensor:
        """See :meth:`Geometry.multiply`."""
        codes, doubt = fused.encode_signed(x.numel(), as_blocks(x, PerTensor()), grid.parts)
        sums = torch._int_mm(codes.view(-1, x.shape[-1]), weight.codes.T)
        out = len(weight.codes)
        # Codes stand for numbers from zero on, less 128; in whole numbers nothing is lost.
        shift, factor = (128 - grid.zero) * weight.total, grid.scale * weight.scale
        made = fused.finish(sums.numel(), sums, shift, factor, _doubted(bias, doubt, out))
        # Networks may write into it, which autograd refuses for a view that a function of ours has made.
        return fused.bare(made.view(*x.shape[:-1], out))

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Geometry.gradients`."""
        rows = grad.reshape(-1, grad.shape[-1])
        return (rows @ weight).view(x.shape), rows.T @ x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class Windows(Geometry):
    """Of ``nn.Conv2d`` without groups, padded with zeros."""

    turned: ClassVar[bool] = True

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    few: bool
    """Whether :mod:`dqss.stem` has the faster gradient of the input."""

    def sizes(self, x: torch.Size, weight: torch.Size) -> tuple[int, int]:
        """See :meth:`Geometry.sizes`."""
        if len(x) != len(weight):
            return 0, 0
        reach = [d * (size - 1) for d, size in zip(self.dilation, weight[2:], strict=True)]
        each = zip(x[2:], self.padding, reach, self.stride, strict=True)
        high, wide = ((size + 2 * padding - over - 1) // stride + 1 for size, padding, over, stride in each)
        return x[0] * high * wide, weight[1:].numel()

    def multiply(self, x: Tensor, grid: ByteGrid, weight: ByteWeight, bias: Tensor | None) -> Tensor:
        """See :meth:`Geometry.multiply`."""
        codes, doubt = fused.encode(x.numel(), as_blocks(x, PerTensor()), grid.parts)
        ops, way = torch.ops.onednn, (grid.scale, grid.zero)
        window = (self.stride, self.padding, self.dilation, 1)
        packed = ops.qconv_prepack(weight.codes, weight.scale, *way, *window, list(x.shape))
        zeros = torch.zeros_like(weight.total)
        given = (packed, weight.scale, zeros, _doubted(bias, doubt, len(zeros)))
        return _channels_first(ops.qconv2d_pointwise(codes.view(x.shape), *way, *given, *window, *_PLAIN))

    def gradients(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Geometry.gradients`."""
        way = (self.stride, self.padding, self.dilation, False, (0, 0), 1)
        found = torch.ops.aten.convolution_backward(grad, x, weight, None, *way, (not self.few, True, False))
        if self.few:
            return stem.input_gradient(grad, weight, x.shape, self.stride[0], self.padding), found[1]
        return found[0], found[1]


_PLAIN: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
"""Nothing follows the product: neither a scale nor a zero point of the output, and no function."""


def _doubted(bias: Tensor | None, doubt: Tensor, out: int) -> Tensor:
    """What is no number has no code: it goes on by the bias."""
    return doubt.expand(out).contiguous() if bias is None else bias + doubt


def _channels_first(made: Tensor) -> Tensor:
    """The library puts channels last; networks may rely on the layout that they would have."""
    if made.is_contiguous():
        return made
    turned: Tensor = fused.turn(made.numel(), made.permute(0, 2, 3, 1).contiguous())
    return turned


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether this machine and this torch multiply bytes exactly and fast."""
    ops = ("qconv_prepack", "qconv2d_pointwise")
    return (
        os.environ.get("DQSS_INTEGERS", "1") != "0"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(getattr(torch.cpu, "_is_vnni_supported", bool)())  # without it, sums of two saturate
        and hasattr(torch, "_int_mm")
        and all(hasattr(torch.ops.onednn, op) for op in ops)
    )


@dataclass
class IntegerLayer:
    """A layer with both its quantizers; see :func:`hasten`."""

    geometry: Geometry
    weight: MixedWeight
    activation: MixedActivation
    _pays: dict[torch.Size, bool] = field(default_factory=dict)

    def applies(self, x: Tensor) -> bool:
        """Whether ``x``, as it comes to the layer, is to be multiplied here."""
        # The size first: most layers of small networks are asked for nothing else.
        if self.activation.mode is not Mode.RELAXED or not self._worthwhile(x.shape):
            return False
        decisions = self.activation.decision, self.weight.decision
        return (
            all(isinstance(decision.relaxation, _DRAWN) for decision in decisions)
            and torch.is_grad_enabled()
            and x.dtype is torch.float32
            and x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
            and fused.Kernel.fuses(x.numel())
            and self._grids(x).byte_grids[_place_of(decisions[0])] is not None
            and self.weight.stack.byte_weights is not None
        )

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output; gradients reach ``x`` and the logits of both decisions."""
        (of_x, place), (of_weight, row) = (part.decision.mixture() for part in (self.activation, self.weight))
        made: Tensor = _Multiply.apply(
            x, of_x, of_weight, bias, self.geometry, self._grids(x), place, self.weight.stack, row
        )
        return made

    def _grids(self, x: Tensor) -> GridStack:
        return self.activation.grids(x.shape)

    def _worthwhile(self, shape: torch.Size) -> bool:
        if shape not in self._pays:
            weight = self.weight.stack.shape
            positions, depth = self.geometry.sizes(shape, weight)
            least = PRODUCTS * TURNED if self.geometry.turned else PRODUCTS
            enough = positions * depth * weight[0] >= least
            self._pays[shape] = enough and positions >= POSITIONS and depth >= DEPTH
        return self._pays[shape]


def _place_of(decision: Decision) -> int:
    """Where the option drawn is."""
    place = decision.place()
    assert place is not None
    return place


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        of_x: Tensor,
        of_weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        grids: GridStack,
        place: int,
        stack: CodeStack,
        row: int,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.way = geometry, grids, place, stack, row
        grid, weights = grids.byte_grids[place], stack.byte_weights
        assert grid is not None and weights is not None
        return geometry.multiply(x, grid, weights[row], bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (x,) = ctx.saved_tensors
        geometry, grids, place, stack, row = ctx.way
        made, weight = on_grid(x, grids, place), stack.choose(row)
        grad_x, grad_weight = geometry.gradients(grad_outputs[0], made, weight)
        passed, sums = drawn_gradients(x, grad_x, grids, place)
        return passed, sums, stack.sums(grad_weight), *[None] * 6


def hasten(layer: nn.Module, weight: MixedWeight, activation: MixedActivation) -> None:
    """Let ``layer`` multiply integers where that pays; both quantizers are attached to it already."""
    geometry = _geometry(layer)
    if geometry is None or type(weight) is not MixedWeight or type(activation) is not MixedActivation:
        return
    if "forward" not in vars(layer) and available():
        activation.bypass = IntegerLayer(geometry, weight, activation)
        layer.forward = MethodType(_forward, layer)  # which, unlike a closure, is copied with its layer


def _forward(layer: Any, input: Tensor) -> Tensor:  # as layers call it
    bypass = getattr(layer._modules.get(INPUT_QUANTIZER), "bypass", None)
    if bypass is not None and bypass.applies(input):
        made: Tensor = bypass(input, layer.bias)
        return made
    made = type(layer).forward(layer, input)
    return made


def _geometry(layer: nn.Module) -> Geometry | None:
    if isinstance(layer, nn.Linear) and _unchanged(layer, nn.Linear, "forward"):
        return Rows()
    if (
        isinstance(layer, nn.Conv2d)
        and _unchanged(layer, nn.Conv2d, "forward", "_conv_forward")
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    ):
        return Windows(layer.stride, layer.padding, layer.dilation, stem.fits(layer))  # type: ignore[arg-type]
    return None


def _unchanged(layer: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    return all(getattr(type(layer), method) is getattr(kind, method) for method in methods)

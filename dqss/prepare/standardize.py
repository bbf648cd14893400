"""Bake weight standardization: layers whose forward multiplies something else than their weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dqss.errors import ModelError
from dqss.prepare.modules import KINDS, Layer, Transposed, has_own_forward, plain_kind, random_probe, replace
from dqss.prepare.work import Work, difference, reproducible, run, tolerance

_FUNCTIONS = (
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.linear,
)
_PADDING = 4  # its position among the arguments of every convolution


class PaddedConv2d(nn.Conv2d):
    """A convolution that pads its input to ``ceil(size / stride)`` outputs, the odd pixel at the end.

    The "SAME" padding of TensorFlow; it depends on the size of the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``."""
        pads: list[int] = []
        for axis in (1, 0):  # F.pad wants the last axis first
            size, stride = input.shape[axis - 2], self.stride[axis]
            extent = (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
            total = max((math.ceil(size / stride) - 1) * stride + extent - size, 0)
            pads += [total // 2, total - total // 2]
        padded = F.pad(input, pads)
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


@dataclass(frozen=True)
class _Product:
    """One multiplication inside a layer's forward."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    padding: Any
    output: Tensor


class _Products(TorchFunctionMode):
    """Listens to convolutions and linear products."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Product] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in _FUNCTIONS:

            def read(position: int, key: str) -> Any:
                return args[position] if len(args) > position else kwargs.get(key)

            padding = read(_PADDING, "padding") or 0
            inputs = read(0, "input"), read(1, "weight"), read(2, "bias")
            self.found.append(_Product(*inputs, padding, output))
        return output


@dataclass(frozen=True)
class _Call:
    """How a layer was called: the shape of its first argument, and the others."""

    shape: tuple[int, ...]
    like: Tensor
    rest: tuple[Any, ...]
    kwargs: dict[str, Any]

    def sizes(self, layer: Layer) -> Iterator[Tensor]:
        """One-image inputs of this size and, for convolutions, of every remainder modulo the stride."""
        dims = KINDS[cast(type[Layer], plain_kind(layer))]
        lead = self.shape[: len(self.shape) - dims]
        if len(lead) == 2:
            lead = (1, lead[1])
        stride = 1 if isinstance(layer, nn.Linear) else max(layer.stride)
        for more in range(stride + 1 if dims else 1):
            sizes = tuple(size + more for size in self.shape[len(self.shape) - dims :])
            yield random_probe((*lead, *sizes), self.like)


def first_calls(work: Work, layers: Iterable[nn.Module]) -> dict[nn.Module, _Call]:
    """Run the batch and record the first call of each of ``layers``."""
    found: dict[nn.Module, _Call] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in found and args and isinstance(args[0], Tensor):
            found[module] = _Call(tuple(args[0].shape), args[0].new_empty(()), args[1:], kwargs)

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        run(work.model, work.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def is_affine_in_weight(layer: Layer, call: Callable[[], Tensor]) -> bool:
    """Whether ``f(2W) - f(0) = 2 (f(W) - f(0))``, which the one-convolution theorem rests on.

    Args:
        layer: its weight is changed and put back.
        call: runs the layer on a fixed input.
    """
    kept = layer.weight.detach().clone()
    outputs = []
    try:
        for factor in (0.0, 1.0, 2.0):
            layer.weight.data.copy_(kept * factor)
            outputs.append(call().double())
    finally:
        layer.weight.data.copy_(kept)
    zero, one, two = outputs
    single, double = one - zero, two - zero
    return difference(2 * single, double) <= tolerance(1e-3, layer.weight)


def _plain(layer: Layer, product: _Product, kind: type[Layer], **padding: Any) -> Layer:
    """A layer of ``kind`` like ``layer`` with the weight and bias that were multiplied."""
    bias = product.bias is not None
    if isinstance(layer, nn.Linear):
        made: Layer = nn.Linear(layer.in_features, layer.out_features, bias, device="meta")
    else:
        options: dict[str, Any] = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
        if isinstance(layer, Transposed):
            options["output_padding"] = layer.output_padding
        shape = (layer.in_channels, layer.out_channels, layer.kernel_size)
        build = cast(Callable[..., Layer], kind)
        made = build(*shape, bias=bias, device="meta", **options, **padding)
    made.weight = nn.Parameter(product.weight.detach().clone(), requires_grad=layer.weight.requires_grad)
    if product.bias is not None:
        trained = (layer.weight if layer.bias is None else layer.bias).requires_grad
        made.bias = nn.Parameter(product.bias.detach().clone(), requires_grad=trained)
    return made.train(layer.training)


def _candidates(layer: Layer, product: _Product, given: Tensor) -> Iterator[Layer]:
    """Plain layers that may compute the same, by the ways a forward can pad its input."""
    kind = cast(type[Layer], plain_kind(layer))
    if isinstance(layer, nn.Linear):
        yield _plain(layer, product, kind)
        return
    yield _plain(layer, product, kind, padding=product.padding)
    if kind is nn.Conv2d:  # even where this size needed no padding
        yield _plain(layer, product, PaddedConv2d)
    if product.input.shape == given.shape:
        return
    yield _plain(layer, product, kind, padding=layer.padding, padding_mode=layer.padding_mode)
    dims = KINDS[kind]
    grown = [b - a for a, b in zip(given.shape[-dims:], product.input.shape[-dims:], strict=True)]
    if product.padding in (0, (0,) * dims) and all(size >= 0 and size % 2 == 0 for size in grown):
        yield _plain(layer, product, kind, padding=tuple(size // 2 for size in grown))


def _same(layer: nn.Module, plain: Layer, call: _Call, probes: Iterable[Tensor]) -> bool:
    for probe in probes:
        wanted = layer.forward(probe, *call.rest, **call.kwargs)
        try:
            if difference(wanted, plain.forward(probe)) > tolerance(1e-5, plain.weight):
                return False
        except RuntimeError:
            return False
    return True


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype and torch.equal(first, second)


def _baked(layer: Layer, call: _Call) -> Layer | None:
    """A plain layer with the same output, ``layer`` itself if it needs none, None if there is none."""
    probe = next(call.sizes(layer))

    def forward() -> Any:
        return layer.forward(probe, *call.rest, **call.kwargs)

    with _Products() as products:
        output = forward()
    if not isinstance(output, Tensor):
        return None
    direct = any(_equal(product.weight, layer.weight) for product in products.found)
    affine = is_affine_in_weight(layer, forward)
    if affine and direct:
        return layer
    if len(products.found) == 1 and products.found[0].output is output:
        for candidate in _candidates(layer, products.found[0], probe):
            if _same(layer, candidate, call, call.sizes(layer)):
                return candidate
    return layer if affine else None


def bake_weight_standardization(work: Work, excluded: Collection[str]) -> list[str] | None:
    """Replace layers that transform their weight in forward (arXiv 1903.10520, 2101.08692) by plain ones.

    Quantizing before such a transformation is not quantizing the tensor that is multiplied.

    Returns:
        Names that were left as they are, or None if no layer was replaced.

    Raises:
        ModelError: for a layer that is not linear in its weight, cannot be baked, and is not skipped.
    """
    own = {n: m for n, m in work.model.named_modules() if has_own_forward(m) and n not in excluded}
    if not own:
        return None
    calls, left, found = first_calls(work, own.values()), list(excluded), False
    with reproducible(work.model):
        for name, module in own.items():
            if module not in calls or "weight" not in module._parameters:
                continue
            layer = cast(Layer, module)
            plain = _baked(layer, calls[module])
            if plain is None and not work.skip(name):
                raise ModelError(
                    f"layer {name!r} ({type(module).__name__}): its output is not linear in its weight; "
                    f"exclude it with search_space.skip=[{name}]"
                )
            if plain is None:
                left.append(name)
            elif plain is not module:
                work.model = replace(work.model, module, plain)
                found = True
    return left if found else None

"""Put kernels on the layers and additions of a fake-quantized network, without wrapping them.

A layer's forward runs as it is, paddings and all; the one convolution or product in it is computed from
integers. Around it, values stay real numbers on grids, which stand for integers one to one. Under
``torch.export`` a layer is what it is without a kernel: what computes integers is the runtime's affair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dqss.arithmetic.codes import CodeKernel, make_code_kernel
from dqss.arithmetic.doubles import Doubles
from dqss.arithmetic.halving import Halving
from dqss.arithmetic.kernels import LayerKernel, make_kernel
from dqss.arithmetic.kinds import IntegerKernels
from dqss.arithmetic.points import KERNELS
from dqss.arithmetic.readers import Reading, grids_of, is_bytes
from dqss.bundle import Bundle
from dqss.choice import POINT_OPERANDS
from dqss.layered import Layered, can_precede, put_before
from dqss.measure import home
from dqss.products.attach import PRODUCT_QUANTIZERS

KERNEL = "integer_kernel"


def attach_kernels(
    model: nn.Module, bundle: Bundle, seen: Reading, arithmetic: IntegerKernels
) -> tuple[str, ...]:
    """Compute in integers whatever an integer kernel would.

    Args:
        model: from :func:`dqss.apply.apply_strategy`, fake-quantized; it is changed.
        bundle: that was applied.
        seen: from :func:`dqss.arithmetic.readers.reading`, before anything was put on the network.
        arithmetic: the kernels.

    Returns:
        Names of what is computed so.
    """
    modules, grids, outputs = dict(model.named_modules()), grids_of(bundle, home(model)), seen.outputs
    found = list[str]()
    for name in bundle.strategy.layers:
        weight, inputs = grids.get(f"{name}.weight"), grids.get(f"{name}.activation")
        # More axes than a matrix has: a product, and an addition in real numbers.
        apart = isinstance(modules[name], nn.Linear) and seen.axes.get(name) != 2
        if weight is None or inputs is None or not is_bytes(inputs) or apart:
            continue
        kernel = make_kernel(modules[name], weight, inputs, outputs.get(name), arithmetic.weight_bits)
        if kernel is not None:
            _attach(modules[name], kernel)
            found.append(name)
    for name, point in bundle.strategy.points.items():
        names = POINT_OPERANDS[point.kind]
        operands = [grids[f"{name}.{key}"] for key in names if key in point.operands]
        whole = bool(operands) and len(operands) == len(names) and all(map(is_bytes, operands))
        if point.kind in KERNELS and name in outputs and whole:
            owner, _, last = name.rpartition(".")
            quantizers: Any = getattr(modules[owner], PRODUCT_QUANTIZERS)
            quantizers[last] = KERNELS[point.kind](quantizers[last], operands, outputs[name])
            found.append(name)
    return tuple(found)


def attach_exact(model: nn.Module, bundle: Bundle) -> tuple[str, ...]:
    """Compute in exact sums whatever can be; see :class:`dqss.arithmetic.kinds.ExactSums`.

    Args:
        model: from :func:`dqss.apply.apply_strategy`, fake-quantized; it is changed.
        bundle: that was applied.

    Returns:
        Names of the layers that are computed so.
    """
    modules, grids = dict(model.named_modules()), grids_of(bundle, home(model))
    found = list[str]()
    for name in bundle.strategy.layers:
        weight, inputs = grids.get(f"{name}.weight"), grids.get(f"{name}.activation")
        if weight is None or inputs is None or getattr(modules[name], "padding_mode", "zeros") == "circular":
            continue
        kernel = make_code_kernel(modules[name], weight, inputs)
        if kernel is not None:
            _attach(modules[name], kernel)
            found.append(name)
    if can_precede(model):
        put_before(model, _Reals)
    return tuple(found)


class _Kernel(Layered):
    """Before a layer's class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            return super().forward(*args, **kwargs)
        with _Computing(getattr(self, KERNEL)):
            return super().forward(*args, **kwargs)


class _Reals(Layered):
    """Before the class of a whole network: averages, and functions that have no exact result."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            return super().forward(*args, **kwargs)
        with Halving(), Doubles():
            return super().forward(*args, **kwargs)


class _Computing(TorchFunctionMode):
    """Computes a layer's convolution or product by its kernel."""

    def __init__(self, kernel: LayerKernel | CodeKernel) -> None:
        super().__init__()
        self.kernel = kernel

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if len(args) < 3 or kwargs or not self.kernel.computes(func, args[0]):
            return func(*args, **kwargs)
        x, _, _, *rest = args
        return self.kernel(func, x, *rest)


def _attach(layer: nn.Module, kernel: LayerKernel | CodeKernel) -> None:
    layer.add_module(KERNEL, kernel)
    put_before(layer, _Kernel)

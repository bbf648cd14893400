"""Quantize the operands of products inside a module's forward, without wrapping or tracing it.

Around the forward of a module that multiplies activations a ``TorchFunctionMode`` sees every
torch function; products are counted as they come, and those that have quantizers are computed
from quantized operands. Additions, concatenations and averages are counted and computed likewise, as
points: "product" below means both. The forward is overridden in a subclass made for the module's class, as
torch's own parametrizations do it, and not by hooks: a hook that leaves a mode is not called after
an interrupt, and the mode would go on quantizing other people's products. Class name, attributes
and names stay; the module copies and pickles. ``torch.compile`` leaves such a forward out, and
``torch.export`` takes it with ``strict=False``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dqss.choice import OPERANDS
from dqss.errors import StrategyError
from dqss.layered import Layered, can_precede, put_before
from dqss.products.meet import Meeting, as_meeting
from dqss.products.multiply import Product, as_product

PRODUCT_QUANTIZERS = "product_quantizers"
POINT = "point"
"""What stands before the number of a point among a module's quantizers; products have the number alone."""


class ProductQuantizer(nn.Module):
    """What quantizes the operands of one product or point.

    Args:
        name: of the product.
        kind: decides what its operands are.
        operands: quantizers by the operand's name; an operand without one stays in float.
    """

    def __init__(self, name: str, kind: str, operands: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.name, self.kind = name, kind
        self.operands = nn.ModuleDict(dict(operands))

    @property
    def word(self) -> str:
        """What it is: a product or a point."""
        return "product" if self.kind in OPERANDS else "point"

    @property
    def idle(self) -> bool:
        """Whether it does nothing at all, so that the product may run as it is."""
        return all(getattr(quantizer, "idle", False) for quantizer in self.operands.values())

    def quantize(self, operand: str, value: Tensor) -> Tensor:
        """One operand as it is multiplied."""
        if operand not in self.operands:
            return value
        found: Tensor = self.operands[operand](value)
        return found

    def forward(self, product: Product | Meeting) -> Any:
        """The product of the quantized operands.

        Raises:
            StrategyError: where the network multiplies in another way than it was searched with.
        """
        if product.kind != self.kind:
            raise StrategyError(
                f"{self.word} {self.name!r} is of the kind {product.kind!r} here and was {self.kind!r} in "
                "the search: build the model with the same kernels (timm: TIMM_FUSED_ATTN), or search again"
            )
        return product.quantized(self.quantize)

    def extra_repr(self) -> str:
        """The product's name and kind, for ``print(model)``."""
        return f"{self.name!r}, {self.kind}"


def can_attach(module: nn.Module) -> bool:
    """Whether the forward of ``module`` is its class's own (or ours), and a further child does no harm.

    Containers run or count their children.
    """
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    taken = isinstance(module, containers) or PRODUCT_QUANTIZERS in {*vars(module), *module._modules}
    return isinstance(module, _Multiplies) or (not taken and can_precede(module))


def attach_products(module: nn.Module, products: Mapping[int, ProductQuantizer]) -> None:
    """Quantize products, or points, of the module's own forward, by their position among them in it."""
    if not isinstance(module, _Multiplies):
        module.add_module(PRODUCT_QUANTIZERS, nn.ModuleDict())
        put_before(module, _Multiplies)
    quantizers: Any = getattr(module, PRODUCT_QUANTIZERS)
    for index in sorted(products):
        quantizers[key_of(products[index].word, index)] = products[index]


def detach_products(module: nn.Module, quantizers: Iterable[ProductQuantizer]) -> None:
    """Undo :func:`attach_products`; another's quantizers stay."""
    known: Any = getattr(module, PRODUCT_QUANTIZERS)
    ours = set(quantizers)
    for key in [key for key, quantizer in known.items() if quantizer in ours]:
        del known[key]
    if not len(known):
        module.__class__ = type(module).__bases__[1]
        delattr(module, PRODUCT_QUANTIZERS)


def key_of(word: str, index: int) -> str:
    """Of the ``index``-th product or point among a module's quantizers."""
    return f"{POINT if word == POINT else ''}{index}"


class _Multiplies(Layered):
    """Before a module's class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        quantizers: Any = getattr(self, PRODUCT_QUANTIZERS)
        if all(quantizer.idle for quantizer in quantizers.values()):
            return super().forward(*args, **kwargs)
        mode = _Multiplying(quantizers, sys._getframe())
        try:
            with mode:
                result = super().forward(*args, **kwargs)
            mode.check()
            return result
        finally:
            mode.frame = None  # it would hold the inputs until the garbage is collected

    @classmethod
    def overrides(cls) -> dict[str, Any]:
        # Compiled, a mode would see the functions inside a function too, and count other products.
        return {"forward": torch.compiler.disable(cls.forward)}  # type: ignore[no-untyped-call]


class _Multiplying(TorchFunctionMode):
    """Counts the products, and the points, of one call of a module's forward, whose frame is given."""

    def __init__(self, quantizers: nn.ModuleDict, frame: FrameType) -> None:
        super().__init__()
        self.quantizers = quantizers
        self.counts = Counter[str]()
        self.frame: FrameType | None = frame

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product: Product | Meeting | None = as_product(func, args, kwargs)
        word = "product"
        if product is None:
            product, word = as_meeting(func, args, kwargs), POINT
        if product is None or self.frame is None or not _runs_directly_in(self.frame):
            return func(*args, **kwargs)
        key = key_of(word, self.counts[word])
        self.counts[word] += 1
        return self.quantizers[key](product) if key in self.quantizers else product.plain()

    def check(self) -> None:
        """See that every product that has a quantizer was computed.

        Raises:
            StrategyError: naming the first that was not.
        """
        quantizers: Any = self.quantizers
        for key, quantizer in quantizers.items():
            if int(key.removeprefix(POINT)) >= self.counts[quantizer.word]:
                word, does = quantizer.word, "adds" if quantizer.word == POINT else "multiplies"
                raise StrategyError(
                    f"{word} {quantizer.name!r} was not computed: the network {does} in another way "
                    "than it was searched with; build it as it was then, or search again"
                )


def _runs_directly_in(forward: FrameType) -> bool:
    """Whether a mode's caller runs in ``forward`` with no other module's call in between."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame is not forward:
        if frame.f_code is nn.Module._call_impl.__code__:
            return False
        frame = frame.f_back
    return frame is forward

"""A copy of the simulated network in which every quantizer is one operator with a name.

Traced as what it computes, a quantizer would come out as a dozen elementwise nodes that no runtime
knows for a quantizer. In the copy it is a single node of a domain of its own, in the place of which
:mod:`dqss.deploy.lower` puts what ONNX has for it. Run and not traced, the copy computes what the
simulation computes, and notes the integer codes of everything that it quantizes.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dqss.attach import INPUT_QUANTIZER, OUTPUT_QUANTIZER, attach_weight
from dqss.choice import OUTPUT, PointStrategy, ProductStrategy
from dqss.functional import quantize
from dqss.products.attach import PRODUCT_QUANTIZERS
from dqss.quantizers import Quantizer
from dqss.strategy import Strategy

DOMAIN = "dqss"
"""Of the named nodes in a traced graph; none is left in a file."""
QUANTIZE, WEIGHT = "Quantize", "Weight"
Call = tuple[str, int]
"""A quantizer's name, and the how manieth time in a pass it is called."""


@dataclass
class Notes:
    """What the marks of one network share.

    Attributes:
        tracing: whether they stand for nodes, or compute.
        calls: how often each was called in this pass.
        codes: what was quantized in this pass, as integers held in fp32; None to keep nothing.
    """

    tracing: bool = False
    calls: Counter[str] = field(default_factory=Counter)
    codes: dict[Call, Tensor] | None = None

    def begin(self) -> None:
        """A new pass."""
        self.calls.clear()
        if self.codes is not None:
            self.codes = {}

    @contextmanager
    def while_tracing(self) -> Iterator[None]:
        """Inside, marks stand for nodes."""
        self.tracing = True
        try:
            yield
        finally:
            self.tracing = False

    @contextmanager
    def keeping_codes(self) -> Iterator[None]:
        """Inside, every pass keeps its codes."""
        self.codes = {}
        try:
            yield
        finally:
            self.codes = None


class ActivationMark(nn.Module):
    """Stands for the quantizer of a layer's input or output, or of the operand of a product or point."""

    def __init__(self, name: str, quantizer: Quantizer, notes: Notes) -> None:
        super().__init__()
        self.name, self.quantizer, self.notes = name, quantizer, notes

    def forward(self, x: Tensor) -> Tensor:
        """What the quantizer gives, or its node."""
        call = self.notes.calls[self.name]
        self.notes.calls[self.name] += 1
        if self.notes.tracing:
            return _node(QUANTIZE, x, name=self.name, call=call)
        if self.notes.codes is not None:
            grid = self.quantizer.grid()
            self.notes.codes[self.name, call] = quantize(x, *grid.shaped(x.shape), grid.spec)
        found: Tensor = self.quantizer(x)
        return found


class WeightMark(nn.Module):
    """Stands for a weight that holds its quantized values already."""

    def __init__(self, name: str, notes: Notes) -> None:
        super().__init__()
        self.name, self.notes = name, notes

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, or its node."""
        return _node(WEIGHT, weight, name=self.name) if self.notes.tracing else weight


def _node(kind: str, x: Tensor, **attributes: Any) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", (x,), attributes, dtype=x.dtype, shape=x.shape, version=1
    )


class Marked(nn.Module):
    """The simulated network with marks, called with tensors alone and returning tensors alone.

    Args:
        simulation: from :func:`dqss.apply.apply_strategy`; it is copied.
        strategy: that was applied.
    """

    def __init__(self, simulation: nn.Module, strategy: Strategy) -> None:
        super().__init__()
        self.network = copy.deepcopy(simulation)
        self.notes = Notes()
        modules = dict(self.network.named_modules())
        for name, choice in strategy.layers.items():
            layer = modules[name]
            if choice.activation is not None:
                self._replace(layer, INPUT_QUANTIZER, f"{name}.activation")
            if choice.weight is not None:
                attach_weight(layer, WeightMark(f"{name}.weight", self.notes))
        functions: dict[str, ProductStrategy | PointStrategy] = {**strategy.products, **strategy.points}
        for name, found in functions.items():
            if found.kind == OUTPUT:
                self._replace(modules[name], OUTPUT_QUANTIZER, f"{name}.{OUTPUT}")
                continue
            owner, _, last = name.rpartition(".")
            quantizers: Any = getattr(modules[owner], PRODUCT_QUANTIZERS)
            operands = quantizers[last.removeprefix("product")].operands
            for operand in found.operands:
                self._replace(operands, operand, f"{name}.{operand}")

    def _replace(self, parent: nn.Module, child: str, name: str) -> None:
        quantizer = parent.get_submodule(child)
        assert isinstance(quantizer, Quantizer)
        parent.add_module(child, ActivationMark(name, quantizer, self.notes))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the network's own."""
        self.notes.begin()
        return self.network(*args, **kwargs)

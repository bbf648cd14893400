"""How much a network multiplies and holds for one input: watched in one pass, not traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dqss.calls import call_model
from dqss.layers import searchable_layers
from dqss.mixed import MixedActivation, Mode
from dqss.supernet import Supernet


@dataclass
class Workload:
    """Of one input.

    Attributes:
        macs: multiply-accumulate operations of each layer, also in float, and of each product under
            search, by its name; none of a layer whose weight is read while its forward is never called.
        elements: by the name of each quantizer of activations (``conv1.activation``): values in the
            largest tensor that came to it.
    """

    macs: dict[str, int] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def watch(supernet: Supernet, example: Any) -> Workload:
    """Run the float network once and count.

    Args:
        supernet: calibrated, so that its products are known.
        example: a batch of one input.
    """
    found = Workload()
    with _elements(supernet, found.elements), supernet.mode(Mode.FLOAT):
        for product in supernet.products.values():
            for _, quantizer in product.operands():
                quantizer.mode = Mode.PROBE  # float too, but the product goes through its module
        with FlopCounterMode(display=False) as counter:
            call_model(supernet.model, example)
    counts = {name: sum(by_kind.values()) for name, by_kind in counter.get_flop_counts().items()}
    root = type(supernet.model).__name__
    for name in searchable_layers(supernet.model):
        found.macs[name] = counts.get(f"{root}.{name}" if name else root, 0) // 2
    for name, product in supernet.products.items():
        inside = f"{name.rpartition('.')[0]}.product_quantizers.{product.index}".lstrip(".")
        found.macs[name] = counts.get(f"{root}.{inside}", 0) // 2
    return found


@contextmanager
def _elements(supernet: Supernet, found: dict[str, int]) -> Iterator[None]:
    handles = []
    for name, quantizer in activations(supernet):

        def see(module: Any, args: tuple[Tensor, ...], name: str = name) -> None:
            found[name] = max(found.get(name, 0), args[0].numel())

        handles.append(quantizer.register_forward_pre_hook(see))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def activations(supernet: Supernet) -> Iterator[tuple[str, MixedActivation]]:
    """Every quantizer of activations by its own name, whatever decision it follows."""
    for name, layer in supernet.layers.items():
        if layer.activation is not None:
            yield f"{name}.activation", layer.activation
    for name, product in supernet.products.items():
        for operand, quantizer in product.operands():
            yield f"{name}.{operand}", quantizer

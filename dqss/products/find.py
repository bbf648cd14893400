"""Find the products of two activations in a forward pass, and the module in whose forward each is.

And what else is a function of activations alone: additions, concatenations, averages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from dqss.products.attach import can_attach
from dqss.products.meet import Meeting
from dqss.products.multiply import HIDDEN, Product

Found = TypeVar("Found", Product, Meeting)


@dataclass(frozen=True)
class Place:
    """Where a product is: the ``index``-th call of a product function in the owner's own forward."""

    name: str
    owner: nn.Module
    index: int


@dataclass
class _Running:
    """One call of a module: what its own forward has multiplied so far."""

    module: nn.Module
    kinds: list[str]


class ProductFinder(TorchFunctionMode, Generic[Found]):
    """Sees products, or whatever ``read`` says, while :meth:`watching`.

    A product belongs to the innermost module that is running. It is numbered by its position among
    all product functions called there, also those with a weight for an operand: whether an operand
    is a weight cannot be seen any more once weights are quantized.

    Args:
        model: whose modules may own products.
        seen: called with every product of two activations, as it is computed.
        read: says whether the call of a function is one.
        word: what it is called, in names.
    """

    def __init__(
        self,
        model: nn.Module,
        seen: Callable[[Place, Found], None],
        read: Callable[[Any, tuple[Any, ...], dict[str, Any]], Found | None],
        word: str,
    ) -> None:
        super().__init__()
        self._read: Callable[[Any, tuple[Any, ...], dict[str, Any]], Found | None] = read
        self._word = word
        self._names = {module: name for name, module in model.named_modules()}
        tensors = [*model.parameters(), *model.buffers()]
        self._stored = {_place_in_memory(tensor) for tensor in tensors}
        self._seen: Callable[[Place, Found], None] = seen
        self._running: list[_Running] = []
        self._kinds: dict[nn.Module, list[str]] = {}
        self._vary: set[nn.Module] = set()
        self._places: dict[tuple[nn.Module, int], Place] = {}
        self._not_ours: set[Place] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See the products of everything that runs inside."""
        self._running = []
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def found(self) -> list[Place]:
        """Every product of two activations, in the order of their first call."""
        return list(self._places.values())

    def searchable(self, place: Place) -> bool:
        """Whether a product can be quantized.

        Its module multiplies the same way in every call, both operands are always dense
        floating-point activations, and something can be put around its forward.
        """
        return place.owner not in self._vary and place not in self._not_ours and can_attach(place.owner)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(_Running(module, []))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        # A module whose pre-hooks fail is left without having been entered.
        if self._running and self._running[-1].module is module:
            call = self._running.pop()
            if self._kinds.setdefault(module, call.kinds) != call.kinds:
                self._vary.add(module)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = self._read(func, args, kwargs)
        if product is not None and self._running and self._running[-1].module in self._names:
            self._note(self._running[-1], product)
        return func(*args, **kwargs)

    def _note(self, call: _Running, product: Found) -> None:
        index = len(call.kinds)
        call.kinds.append(product.kind)
        key = call.module, index
        # Parameters and buffers, or views of them.
        if any(isinstance(x, Tensor) and _place_in_memory(x) in self._stored for x in product.given):
            if key in self._places:
                self._not_ours.add(self._places[key])
            return
        known = self._kinds.get(call.module)
        if known is not None and known[: index + 1] != call.kinds:
            self._vary.add(call.module)
        if key not in self._places:
            name = self._names[call.module]
            own = f"{self._word}{index}"
            self._places[key] = Place(f"{name}.{own}" if name else own, *key)
            if known is not None and index < len(known):
                self._not_ours.add(self._places[key])  # an earlier call multiplied with a weight
        place = self._places[key]
        if product.kind == HIDDEN or not product.of_real_tensors():
            self._not_ours.add(place)
        elif place not in self._not_ours and call.module not in self._vary:
            self._seen(place, product)


def _place_in_memory(tensor: Tensor) -> tuple[str, int]:
    """What a tensor shares with its views; sparse and empty ones share nothing."""
    address = tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0
    return ("address", address) if address else ("tensor", id(tensor))

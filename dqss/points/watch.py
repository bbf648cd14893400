"""What becomes of the outputs of layers in one forward pass of the float network, tensor by tensor.

Not traced but watched: the pass runs as it ever does, under a ``TorchFunctionMode``. A tensor that is
written to is another value afterwards; none is held, so that it costs no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dqss.calls import call_model, tensors_in
from dqss.products.find import Place, ProductFinder
from dqss.products.meet import Meeting, as_meeting
from dqss.products.multiply import as_product

_TAKEN_IN: set[Any] = {
    *(torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_, F.relu, F.relu_, F.relu6),
    *(F.hardtanh, F.hardtanh_, torch.clamp, torch.Tensor.clamp, torch.Tensor.clamp_),
}
"""What integer kernels do on their way, by the ends of the integers that they give."""
_KEEPS: set[Any] = {
    *(torch.flatten, torch.Tensor.flatten, torch.reshape, torch.Tensor.reshape, torch.Tensor.view),
    *(torch.Tensor.view_as, torch.Tensor.reshape_as, torch.unflatten, torch.Tensor.unflatten),
    *(torch.squeeze, torch.Tensor.squeeze, torch.unsqueeze, torch.Tensor.unsqueeze),
    *(torch.permute, torch.Tensor.permute, torch.transpose, torch.Tensor.transpose),
    *(torch.Tensor.contiguous, torch.clone, torch.Tensor.clone, torch.detach, torch.Tensor.detach),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
    *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d),
}
"""What only moves values about, or picks some: integers stay integers."""


@dataclass(eq=False)
class Value:
    """A tensor between two writes to it.

    Attributes:
        ends: layers whose output it is, but for what kernels take in.
        places: meetings whose result it is, likewise.
        bare: whether anything reads it that neither quantizes it nor keeps what it is.
        read: whether anything reads it.
    """

    ends: frozenset[str] = frozenset()
    places: frozenset[Place] = frozenset()
    bare: bool = False
    read: bool = False


@dataclass(frozen=True, eq=False)
class Meet:
    """One call of a meeting: what met there, by the operand's name."""

    place: Place
    operands: Mapping[str, Value]


@dataclass
class Seen:
    """What one pass has shown.

    Attributes:
        values: those that are the output of layers or the result of meetings.
        meetings: in the order of their calls.
        readers: what each quantizer of an input read, call by call, by its name.
        outputs: what each layer gave, likewise.
    """

    values: list[Value] = field(default_factory=list)
    meetings: list[Meet] = field(default_factory=list)
    readers: dict[str, list[Value]] = field(default_factory=dict)
    outputs: dict[str, list[Value]] = field(default_factory=dict)


@dataclass(frozen=True)
class Watched:
    """A layer and what quantizes its input."""

    layer: nn.Module
    quantizer: nn.Module


class Watch(TorchFunctionMode):
    """Watches one pass.

    Args:
        layers: those whose inputs are quantized, by name; what happens inside them is theirs.
        ends: names of those whose outputs are followed.
        products: whether products of two activations are quantized.
    """

    def __init__(self, layers: Mapping[str, Watched], ends: Collection[str], products: bool) -> None:
        super().__init__()
        self.seen = Seen()
        self._layers, self._ends, self._products = layers, frozenset(ends), products
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Value]] = {}
        self._inside = 0
        self._met: Place | None = None

    def meet(self, place: Place) -> None:
        """Say which meeting is being computed; a finder around this mode knows."""
        self._met = place

    def run(self, model: nn.Module, example: Any, finder: ProductFinder[Meeting]) -> None:
        """Watch one pass over ``example``."""
        with torch.no_grad(), finder.watching(), self._hooked(), self:
            output = call_model(model, example)
        for tensor in tensors_in(output):
            self._reads(tensor).bare = True

    def _hooked(self) -> ExitStack:
        stack = ExitStack()
        for name, watched in self._layers.items():
            handles = (
                watched.quantizer.register_forward_pre_hook(self._reader(name)),
                watched.layer.register_forward_pre_hook(self._enter),
                watched.layer.register_forward_hook(self._leaver(name), always_call=True),
            )
            for handle in handles:
                stack.callback(handle.remove)
        return stack

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._inside += 1

    def _leaver(self, name: str) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._inside -= 1
            if isinstance(output, Tensor):
                value = Value(ends=frozenset({name} & self._ends))
                self._gives(output, value)
                self.seen.outputs.setdefault(name, []).append(value)

        return leave

    def _reader(self, name: str) -> Any:
        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.seen.readers.setdefault(name, []).append(self._reads(args[0]))

        return read

    # -- values -------------------------------------------------------------------------------

    def _value(self, tensor: Tensor) -> Value:
        """What is known of a tensor as it is now."""
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == _version(tensor):
            return known[2]
        value = Value()
        self._gives(tensor, value)
        return value

    def _reads(self, tensor: Tensor) -> Value:
        value = self._value(tensor)
        value.read = True
        return value

    def _gives(self, tensor: Tensor, value: Value) -> None:
        self._known[id(tensor)] = weakref.ref(tensor), _version(tensor), value
        if value.ends or value.places:
            self.seen.values.append(value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        # Before: what is written to in place is another value afterwards.
        read = [self._value(tensor) for tensor in _tensors((args, kwargs))]
        operands = self._operands(func, args, kwargs)
        self._take()
        output = func(*args, **kwargs)
        met = self._take()
        results = [tensor for tensor in _tensors(output) if not self._is_old(tensor)]
        if results:  # and no shape, type, or the tensor itself
            for value in read:
                value.read = True
            quantized = self._products and as_product(func, args, kwargs) is not None
            found = self._passed(func, read, quantized) if met is None else self._meeting(met, operands)
            for tensor in results:
                self._gives(tensor, found)
        return output

    def _take(self) -> Place | None:
        met, self._met = self._met, None
        return met

    def _is_old(self, tensor: Tensor) -> bool:
        known = self._known.get(id(tensor))
        return known is not None and known[0]() is tensor and known[1] == _version(tensor)

    def _operands(self, func: Any, args: Any, kwargs: Any) -> dict[str, Value]:
        meeting = as_meeting(func, args, kwargs)
        if meeting is None or not meeting.of_real_tensors():
            return {}
        return {name: self._value(x) for name, x in zip(meeting.names, meeting.given, strict=True)}

    def _meeting(self, place: Place, operands: dict[str, Value]) -> Value:
        self.seen.meetings.append(Meet(place, operands))
        return Value(places=frozenset({place}))

    def _passed(self, func: Any, read: list[Value], quantized: bool) -> Value:
        if func in _TAKEN_IN or func in _KEEPS:
            ends = frozenset(name for value in read for name in value.ends)
            return Value(ends, frozenset(place for value in read for place in value.places))
        for value in read:
            value.bare = value.bare or not quantized
        return Value()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))

"""Which layers' channels can only be scaled together: found by watching one batch.

A tensor whose channels are divided by positive factors stays a scaled tensor through whatever commutes with
them; a sum of two is one if both have the same factors. So layers that add to one another, and all that read
their sum, make one group: it starts where layers make the channels and ends where layers read them. What
is not known to commute fixes the factors of what it reads to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dqss.calls import tensors_in
from dqss.prepare.chains import HOMOGENEOUS
from dqss.prepare.modules import KINDS, Transposed, has_own_forward, plain_kind
from dqss.prepare.rounding_error import Ranges
from dqss.prepare.watch import Recorder, is_private, shared_storage, watched
from dqss.prepare.work import Work

_aten = torch.ops.aten
_ELEMENTWISE = {
    _aten.relu.default,
    _aten.relu_.default,
    _aten.leaky_relu.default,
    _aten.leaky_relu_.default,
    _aten.clone.default,
}
_SPATIAL = (HOMOGENEOUS - _ELEMENTWISE) | {
    _aten.upsample_bilinear2d.default,
    _aten.upsample_nearest2d.default,
}
"""They mix places, and leave channels alone that lie on axis 1 of four."""
_SUMS = {_aten.add.Tensor, _aten.add_.Tensor, _aten.sub.Tensor, _aten.sub_.Tensor}
_PRODUCTS = {_aten.mul.Tensor, _aten.mul_.Tensor}


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that make channels, and those that read them, all of the same factors.

    Attributes:
        made, read: their names.
        inputs: ranges of the channels in each reader's input.
    """

    made: tuple[str, ...]
    read: tuple[str, ...]
    inputs: tuple[Ranges, ...]


@dataclass
class _Channels:
    """A set of a union-find forest: what is made and read under the same factors."""

    made: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    inputs: list[Ranges] = field(default_factory=list)
    fixed: bool = False
    above: _Channels | None = None

    def root(self) -> _Channels:
        return self if self.above is None else self.above.root()


@dataclass
class _Value:
    """A tensor that is scaled with ``channels`` along ``axis``; alive, so that its identity is its own."""

    tensor: Tensor
    channels: _Channels
    axis: int


def _join(one: _Channels, other: _Channels) -> None:
    one, other = one.root(), other.root()
    if one is other:
        return
    one.made += other.made
    one.read += other.read
    one.inputs += other.inputs
    one.fixed = one.fixed or other.fixed
    other.above = one


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows scaled tensors through all operations outside of layers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: dict[int, _Value] = {}
        self.kept: list[Tensor] = []
        self.inside = False

    def put(self, tensor: Tensor, channels: _Channels, axis: int) -> None:
        self.values[id(tensor)] = _Value(tensor, channels, axis)
        self.kept.append(tensor)

    def seen(self, given: Any) -> list[_Value]:
        return [self.values[id(t)] for t in tensors_in(given) if id(t) in self.values]

    def fix(self, values: Iterable[_Value]) -> None:
        for value in values:
            value.channels.root().fixed = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [] if self.inside else self.seen((args, kwargs or {}))
        shapes = [value.tensor.shape for value in read]
        output = func(*args, **(kwargs or {}))
        if read and not (kwargs and func not in _SUMS) and self._commutes(func, args, read, output):
            made = next(tensors_in(output))
            if made.shape == shapes[0] or func in _SPATIAL:
                self.put(made, read[0].channels, read[0].axis)
                return output
        self.fix(read)
        return output

    def _commutes(self, func: Any, args: Any, read: list[_Value], output: Any) -> bool:
        """Whether the output is scaled as what is read; joins the two terms of a sum."""
        first = read[0]
        if func in _ELEMENTWISE or func in _PRODUCTS:
            return len(read) == 1  # a factor that is not scaled itself changes nothing
        if func in _SPATIAL:
            return len(read) == 1 and first.axis == 1 and first.tensor.ndim == 4
        if func not in _SUMS or len(read) != 2:
            return False
        other = read[1]
        alike = other.axis == first.axis and other.tensor.shape == first.tensor.shape
        if alike:
            _join(first.channels, other.channels)
        return alike


class _Recorder(Recorder):
    """On all layers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.calls = dict.fromkeys(self.layers, 0)
        shared = shared_storage(model)
        self.usable = {
            n
            for n, m in self.layers.items()
            if not isinstance(m, Transposed) and not has_own_forward(m) and is_private(m, shared)
        }
        self.mode = _Watch()
        self.groups: list[_Channels] = []

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.calls[name] += 1
            self.mode.inside = True  # from here on: what is done with the input here is not the network's
            read = self.mode.seen((args, kwargs))
            plain = name in self.usable and len(args) == 1 and len(read) == 1
            if plain and read[0].axis == _axis(module, read[0].tensor):
                self._read(name, read[0])
            else:
                self.mode.fix(read)

        return enter

    def _read(self, name: str, value: _Value) -> None:
        root = value.channels.root()
        root.read.append(name)
        root.inputs.append(Ranges.of(value.tensor, value.axis))

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.mode.inside = False
            axis = _axis(module, output) if isinstance(output, Tensor) else None
            if name in self.usable and axis is not None:
                self.groups.append(_Channels([name]))
                self.mode.put(output, self.groups[-1], axis)

        return leave


def _axis(module: nn.Module, tensor: Tensor) -> int | None:
    """Of a layer's channels in its input or output; None where there is no batch."""
    if isinstance(module, nn.Linear):
        return tensor.ndim - 1 if tensor.ndim > 1 else None
    kind = plain_kind(module)
    return 1 if kind is not None and tensor.ndim == KINDS[kind] + 2 else None


def find_groups(work: Work) -> tuple[list[Group], list[str]]:
    """Run the batch; return the groups in the order of the network, and the layers that make none of them.

    Layers must be called once, with parameters that are shared with nothing.
    """
    recorder = _Recorder(work.model)
    output = watched(work, recorder.mode, recorder.hook())
    recorder.mode.fix(recorder.mode.seen(output))
    once = {name for name in recorder.usable if recorder.calls[name] == 1}
    found = []
    for group in recorder.groups:
        free = group.above is None and not group.fixed and group.read
        if free and once.issuperset([*group.made, *group.read]):
            found.append(Group(tuple(group.made), tuple(group.read), tuple(group.inputs)))
    makers = {name for group in found for name in group.made}
    return found, [name for name in recorder.layers if name not in makers]

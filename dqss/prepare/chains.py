"""Which layer alone reads which, through nothing that minds a factor a channel: found by watching one batch.

``relu(x / s) = relu(x) / s`` for positive s, and the same holds for pools; a layer's output may then be
divided and the next one's weight multiplied by the same factor a channel (arXiv 1906.04721, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dqss.calls import tensors_in
from dqss.prepare.modules import Layer, Transposed, has_own_forward
from dqss.prepare.watch import Recorder, is_private, shared_storage, watched
from dqss.prepare.work import Work

_aten = torch.ops.aten
HOMOGENEOUS = {
    _aten.relu.default,
    _aten.relu_.default,
    _aten.leaky_relu.default,
    _aten.leaky_relu_.default,
    _aten.max_pool2d_with_indices.default,
    _aten.avg_pool2d.default,
    _aten._adaptive_avg_pool2d.default,
}
"""Operations that commute with a positive factor a channel."""
CAPPED = {_aten.hardtanh.default, _aten.hardtanh_.default}
"""Those of ReLU6, whose cap the factor would move."""


@dataclass(frozen=True)
class Chain:
    """Two layers, the first read by the second alone.

    Attributes:
        first, second: names of the layers.
        cap: name of the ReLU6 between them, if there is one: it needs a cap for each channel.
    """

    first: str
    second: str
    cap: str | None = None

    @property
    def word(self) -> str:
        """As a recipe writes it: ``conv1>conv2``, or ``conv1>act>conv2``."""
        return ">".join(part for part in (self.first, self.cap, self.second) if part)


@dataclass
class _Value:
    """A tensor that came out of a layer, perhaps through operations; alive, so that it is itself."""

    tensor: Tensor
    next: list[_Value | str] = field(default_factory=list)
    cap: str | None = None


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the outputs of layers; a reader is a layer's name, a further value, or "" for anything else."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: dict[int, _Value] = {}
        self.kept: list[_Value] = []
        self.layer: str | None = None
        self.caps: list[str] = []

    def start(self, tensor: Tensor) -> _Value:
        value = _Value(tensor)
        self.values[id(tensor)] = value
        self.kept.append(value)
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.layer is None:
            self._follow(func, args, kwargs or {}, output)
        return output

    def _follow(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        read = [self.values[id(t)] for t in tensors_in((args, kwargs)) if id(t) in self.values]
        cap = self.caps[-1] if self.caps and func in CAPPED else None
        if len(read) == 1 and (func in HOMOGENEOUS or cap is not None):
            following = self.start(next(tensors_in(output)))
            following.cap = cap
            read[0].next.append(following)
            return
        for value in read:
            value.next.append("")


class _Recorder(Recorder):
    """On the layers and the ReLU6s of a network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, is_relu6)
        self.caps = self.others
        self.calls = dict.fromkeys([*self.layers, *self.caps], 0)
        self.outputs: dict[str, _Value] = {}
        self.mode = _Watch()

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.calls[name] += 1
            if name in self.caps:
                self.mode.caps.append(name)
                return
            for position, tensor in enumerate(tensors_in((args, kwargs))):
                value = self.mode.values.get(id(tensor))
                if value is not None:
                    value.next.append(name if position == 0 and len(args) == 1 else "")
            self.mode.layer = name

        return enter

    def _leave(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if name in self.caps:
                self.mode.caps.pop()
                return
            self.mode.layer = None
            if isinstance(output, Tensor):
                self.outputs[name] = self.mode.start(output)

        return leave


def is_relu6(module: nn.Module) -> bool:
    """ReLU6, and what is the same with another cap."""
    return type(module) in (nn.ReLU6, nn.Hardtanh) and cast(nn.Hardtanh, module).min_val == 0


def find_chains(work: Work) -> tuple[list[Chain], list[str]]:
    """Run the batch and return the chains, in the order of the network, and the layers that start none.

    Layers must be called once, with parameters that are shared with nothing.
    """
    recorder = _Recorder(work.model)
    for tensor in tensors_in(watched(work, recorder.mode, recorder.hook())):
        if id(tensor) in recorder.mode.values:
            recorder.mode.values[id(tensor)].next.append("")
    shared = shared_storage(work.model)

    def usable(name: str) -> bool:
        layer = recorder.layers[name]
        plain = not isinstance(layer, Transposed) and not has_own_forward(layer)
        return recorder.calls[name] == 1 and is_private(layer, shared) and plain

    chains = []
    for name, value in recorder.outputs.items():
        found = _second(value)
        if found is None or not usable(name) or not usable(found[0]):
            continue
        second, caps = found
        if all(recorder.calls[cap] == 1 for cap in caps) and len(caps) <= 1 and _fits(recorder, name, second):
            chains.append(Chain(name, second, caps[0] if caps else None))
    started = {chain.first for chain in chains}
    return chains, [name for name in recorder.layers if name not in started]


def _second(value: _Value) -> tuple[str, list[str]] | None:
    """The only layer that reads a value in the end, and the caps on the way."""
    caps: list[str] = []
    while len(value.next) == 1:
        following = value.next[0]
        if isinstance(following, str):
            return (following, caps) if following else None
        caps += [following.cap] if following.cap else []
        value = following
    return None


def _fits(recorder: _Recorder, first: str, second: str) -> bool:
    """Whether the channels of one are those of the other: a flattened picture has others."""
    one, other = (cast(Layer, recorder.layers[name]) for name in (first, second))
    made = one.out_features if isinstance(one, nn.Linear) else one.out_channels
    taken = other.in_features if isinstance(other, nn.Linear) else other.in_channels
    return made == taken and isinstance(one, nn.Linear) == isinstance(other, nn.Linear)

"""Which batch norms directly follow which layers: found by watching one batch, not by tracing."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dqss.prepare.modules import KINDS, Layer, is_batch_norm, plain_kind
from dqss.prepare.work import Work, run


@dataclass
class _Seen:
    """What became of a layer in one batch: users are names of watched modules, "" is outside all."""

    name: str
    calls: int = 0
    ndim: int = 0
    output: weakref.ref[Tensor] | None = None
    output_users: list[str] = field(default_factory=list)
    weight_users: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pair:
    """A layer and the batch norm that alone reads its output."""

    layer_name: str
    norm_name: str
    layer: Layer
    norm: nn.Module


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation that reads a watched tensor, known by its identity.

    Operations on metadata (``shape``, ``dtype``) never come here. Watched outputs are held
    weakly: that costs no memory, and one that outlives the forward has another reader.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.users: dict[int, list[str]] = {}
        self.sources: dict[int, str] = {}
        self.inside: list[str] = [""]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note(args)
        if kwargs:
            self._note(tuple(kwargs.values()))
        return func(*args, **(kwargs or {}))

    def _note(self, values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                users = self.users.get(id(value))
                if users is not None:
                    users.append(self.inside[-1])
            elif isinstance(value, (tuple, list)):
                self._note(value)

    def watch_output(self, output: Tensor, seen: _Seen) -> None:
        key = id(output)

        def forget(_: Any) -> None:  # the next tensor may live at the same address
            self.users.pop(key, None)
            self.sources.pop(key, None)

        seen.output = weakref.ref(output, forget)
        self.users[key], self.sources[key] = seen.output_users, seen.name


class Recorder(ABC):
    """Hooks on the layers of a network and on some other modules, and what they see: for :func:`watched`.

    Args:
        model: the network.
        others: which modules beside its layers.

    Attributes:
        layers, others: by name.
    """

    def __init__(self, model: nn.Module, others: Callable[[nn.Module], bool] = lambda module: False) -> None:
        named = dict(model.named_modules())
        self.layers = {
            n: m for n, m in named.items() if plain_kind(m) is not None and "weight" in m._parameters
        }
        self.others = {n: m for n, m in named.items() if others(m)}

    def hook(self) -> list[Any]:
        """Put the hooks on; what removes them again."""
        handles: list[Any] = []
        for name, module in {**self.layers, **self.others}.items():
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(name)))
        return handles

    @abstractmethod
    def _enter(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """What is called with each call of a module, and its arguments."""

    @abstractmethod
    def _leave(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """What is called with what comes out of it."""


class _Recorder(Recorder):
    """On the layers and norms of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, is_batch_norm)
        self.norms = self.others
        self.seen = {name: _Seen(name) for name in self.layers}
        self.norm_inputs: dict[str, list[str | None]] = {name: [] for name in self.norms}
        self.mode = _Watch()
        for name, layer in self.layers.items():
            for parameter in layer.parameters(recurse=False):
                self.mode.users[id(parameter)] = self.seen[name].weight_users

    def _enter(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in self.norms:
                alone = len(args) == 1 and not kwargs
                self.norm_inputs[name].append(self.mode.sources.get(id(args[0])) if alone else None)
            self.mode.inside.append(name)

        return enter

    def _leave(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.mode.inside.pop()
            if name in self.seen and isinstance(output, Tensor):
                seen = self.seen[name]
                seen.calls, seen.ndim = seen.calls + 1, output.ndim
                self.mode.watch_output(output, seen)

        return leave


def watched(work: Work, mode: TorchDispatchMode, handles: Sequence[Any]) -> Any:
    """The output for the batch at hand, seen by a mode and by hooks, which are removed afterwards."""
    try:
        with mode:
            return run(work.model, work.inputs)
    finally:
        for handle in handles:
            handle.remove()


def shared_storage(model: nn.Module) -> Counter[int]:
    """How many parameters of the model's modules live at each address."""
    return Counter(
        p.data_ptr()
        for module in model.modules()
        for p in module._parameters.values()
        if p is not None and p.numel() > 0
    )


def is_private(layer: nn.Module, shared: Counter[int]) -> bool:
    """Whether no other module has a parameter of ``layer``; ``shared`` is of :func:`shared_storage`."""
    return all(shared[p.data_ptr()] == 1 for p in layer.parameters(recurse=False))


def _fits(seen: _Seen, layer: Layer, norm: nn.Module) -> bool:
    """Whether the norm's channels are the layer's outputs: both sit on axis 1 of a batch."""
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if norm.training or not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        return False
    return seen.ndim == KINDS[cast(type[Layer], plain_kind(layer))] + 2 and mean.shape == (channels,)


def find_pairs(work: Work) -> list[Pair]:
    """Run the batch and return the foldable pairs, in the order of the model's norms.

    A pair: layer and norm called once each, the layer's output object the norm's only input and
    read by nothing else, its parameters read nowhere else and shared with nothing.
    """
    recorder = _Recorder(work.model)
    if not recorder.norms or not recorder.layers:
        return []
    output = watched(work, recorder.mode, recorder.hook())
    shared, pairs = shared_storage(work.model), []
    for norm_name, inputs in recorder.norm_inputs.items():
        if len(inputs) != 1 or inputs[0] is None:
            continue
        seen, norm = recorder.seen[inputs[0]], recorder.norms[norm_name]
        layer = cast(Layer, recorder.layers[seen.name])
        private = is_private(layer, shared)
        alive = seen.output is not None and seen.output() is not None
        alone = seen.output_users == [norm_name] and set(seen.weight_users) <= {seen.name}
        if seen.calls == 1 and private and alone and not alive and _fits(seen, layer, norm):
            pairs.append(Pair(seen.name, norm_name, layer, norm))
    del output  # it had to live until the outputs were looked at
    return pairs

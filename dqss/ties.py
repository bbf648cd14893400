"""Decisions that are made as one: groups of the user's, and groups found in the network.

What must agree is found by watching one forward pass, tensor by tensor, not by tracing. Weights tie
with weights and inputs with inputs; only tensors with the same candidates can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dqss.calls import call_model
from dqss.errors import SearchSpaceError, near_match
from dqss.mixed import MixedQuantizer, MixedWeight, Mode
from dqss.space import TieKind
from dqss.spec import Candidate
from dqss.supernet import Supernet

Group = list[str]
"""Names of tensors: ``conv1.weight``, ``conv1.activation``, ``blocks.0.attn.product0.query``."""

_MEET = {
    *(torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__),
    *(torch.Tensor.__iadd__, torch.cat, torch.concat, torch.concatenate),
}
"""Functions whose operands end up on one grid."""


def tie(supernet: Supernet, example: Any) -> None:
    """Let tensors share decisions as the search space says; what was tied is in ``coverage.ties``.

    Args:
        supernet: calibrated.
        example: a batch of one input, for ties that are found.

    Raises:
        SearchSpaceError: for a pattern that matches nothing, or tensors whose candidates differ.
    """
    space, quantizers = supernet.space, supernet.named_quantizers()
    groups = [_matching(patterns, quantizers, space.name) for patterns in space.ties]
    if space.found_ties:
        groups += find(supernet, example, space.found_ties)
    # What reads one tensor may be tied already.
    groups += supernet.coverage.ties
    supernet.coverage.ties = []
    for names in _joined(groups):
        first, *others = (quantizers[name] for name in names)
        for other in others:
            other.decision = first.decision
        if len({id(quantizers[name]) for name in names}) > 1:
            supernet.coverage.ties.append(names)
    supernet.recognize()


def find(supernet: Supernet, example: Any, kinds: Iterable[TieKind]) -> list[Group]:
    """Groups of tensors that should agree, of which those with other candidates are left apart."""
    watch = _Watch(supernet)
    with torch.no_grad(), supernet.mode(Mode.FLOAT), watch.hooked(), watch:
        call_model(supernet.model, example)
    quantizers = supernet.named_quantizers()
    groups: list[Group] = []
    if TieKind.INPUTS in kinds:
        groups += watch.readers.values()
    if TieKind.RESIDUAL in kinds:
        for layers in _joined(watch.meetings):
            groups += [[f"{layer}.{role}" for layer in layers] for role in ("weight", "activation")]
    known = ([name for name in group if name in quantizers] for group in groups)
    return [part for group in known for part in _alike(group, quantizers) if len(part) > 1]


class _Watch(TorchFunctionMode):
    """Which layers' outputs a tensor is made of, and which layers read one tensor.

    What a function makes of one such tensor is made of the same layers; where several come together,
    only additions and concatenations have an output that is. Every tensor is held while watching, so
    that none takes another's place.
    """

    def __init__(self, supernet: Supernet) -> None:
        super().__init__()
        self._layers = {name: layer.module for name, layer in supernet.layers.items()}
        self._activations = {
            name: layer.activation for name, layer in supernet.layers.items() if layer.activation is not None
        }
        self._sources: dict[int, tuple[str, ...]] = {}
        self._alive: list[Tensor] = []
        self.readers: dict[int, Group] = {}
        self.meetings: list[list[str]] = []

    def hooked(self) -> ExitStack:
        """Watches layers until left."""
        stack = ExitStack()
        for name, layer in self._layers.items():
            handle = layer.register_forward_hook(self._made(name))
            stack.callback(handle.remove)
        for name, quantizer in self._activations.items():
            handle = quantizer.register_forward_pre_hook(self._read(name))
            stack.callback(handle.remove)
        return stack

    def _made(self, name: str) -> Any:
        def made(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in _tensors(output):
                self._note(tensor, (name,))

        return made

    def _read(self, name: str) -> Any:
        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._alive.append(args[0])
            readers = self.readers.setdefault(id(args[0]), [])
            if f"{name}.activation" not in readers:
                readers.append(f"{name}.activation")

        return read

    def _note(self, tensor: Tensor, sources: tuple[str, ...]) -> None:
        self._alive.append(tensor)
        self._sources[id(tensor)] = sources

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = {id(tensor): tensor for tensor in _tensors((args, kwargs))}
        known = [self._sources[key] for key in operands if self._sources.get(key)]
        output = func(*args, **kwargs)
        if known:
            sources = tuple(dict.fromkeys(name for each in known for name in each))
            if len(known) > 1 and func not in _MEET:
                sources = ()
            elif len(known) > 1:
                self.meetings.append(list(sources))
            for tensor in _tensors(output):
                self._note(tensor, sources)
        return output


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _matching(patterns: Sequence[str], quantizers: dict[str, MixedQuantizer], space: str) -> Group:
    """The tensors that one of the user's groups names.

    Raises:
        SearchSpaceError: for a pattern without a tensor, or tensors that cannot agree.
    """
    found: Group = []
    for pattern in patterns:
        names = [name for name in quantizers if fnmatchcase(name, pattern)]
        if not names:
            hint = near_match(pattern, quantizers)
            raise SearchSpaceError(
                f"search space {space!r}: ties: no tensor matches {pattern!r}{hint}; they are called "
                "LAYER.weight and LAYER.activation"
            )
        found += [name for name in names if name not in found]
    for part in _alike(found, quantizers)[1:]:
        raise SearchSpaceError(
            f"search space {space!r}: ties: {found[0]!r} and {part[0]!r} have not the same candidates: "
            "give them the same, or take one out of the group"
        )
    return found


def _alike(names: Sequence[str], quantizers: dict[str, MixedQuantizer]) -> list[Group]:
    """Tensors of one kind with the same candidates in the same order."""
    found: dict[object, Group] = {}
    for name in names:
        options = quantizers[name].decision.options
        kinds = tuple(option.kind for option in options if isinstance(option, Candidate))
        found.setdefault((isinstance(quantizers[name], MixedWeight), kinds), []).append(name)
    return list(found.values())


def _joined(groups: Iterable[Sequence[str]]) -> list[list[str]]:
    """Groups that share a name as one, each name once."""
    found: list[dict[str, None]] = []
    for group in groups:
        touching = [each for each in found if any(name in each for name in group)]
        whole = {name: None for each in touching for name in each} | dict.fromkeys(group)
        found = [each for each in found if each not in touching] + [whole]
    return [list(each) for each in found]

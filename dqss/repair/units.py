"""What is reconstructed as one: blocks and single layers, found by watching one batch go by."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dqss.blocks import AUTO, find_blocks, repeated_blocks
from dqss.calls import call_model
from dqss.errors import UserError
from dqss.prepare.equalize import ChannelCaps
from dqss.repair.partial import Enough, run_until_enough

ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Sigmoid,
    nn.Tanh,
    ChannelCaps,
)
"""Modules that belong to the layer before them: its error counts after them (AdaRound, eq. 25)."""


@dataclass(frozen=True)
class Unit:
    """Modules that map one tensor to one tensor, rows to rows.

    Attributes:
        modules: names of a block or a layer, and perhaps of the activation that follows it.
        layers: names of the layers inside whose weights are reconstructed.
        follows: name of the unit whose output is this one's input, if there is one.
    """

    modules: tuple[str, ...]
    layers: tuple[str, ...]
    follows: str | None = None

    @property
    def name(self) -> str:
        """That of its block or layer."""
        return self.modules[0]

    def run(self, model: nn.Module, x: Tensor) -> Tensor:
        """The output of the unit in ``model`` for the input ``x``."""
        for name in self.modules:
            x = model.get_submodule(name)(x)
        return x


@dataclass
class _Calls:
    """What one module was called with: tensors by identity, with their version when they were seen."""

    count: int = 0
    order: int = 0
    given: tuple[Tensor, int] | None = None
    made: tuple[Tensor, int] | None = None
    plain: bool = False

    @property
    def usable(self) -> bool:
        """Whether it was called once, with one tensor, and gave one with as many rows."""
        if self.count != 1 or not self.plain or self.given is None or self.made is None:
            return False
        x, y = self.given[0], self.made[0]
        return x.ndim > 1 and y.ndim > 1 and len(x) == len(y) and y.is_floating_point()


def find_units(
    model: nn.Module, layers: Collection[str], patterns: Sequence[str], inputs: Any
) -> tuple[list[Unit], list[str]]:
    """Divide the layers of a network into units.

    Args:
        model: the float network.
        layers: names of those whose weights are to be reconstructed.
        patterns: as in :class:`RepairSettings`.
        inputs: one batch.

    Returns:
        Units in the order in which they run, and the names of the layers that are in none, because
        they are never called or more than once, or not with one tensor.

    Raises:
        UserError: for a pattern that matches no block, or one that does not map a tensor to a tensor.
    """
    modules = dict(model.named_modules())
    named = find_blocks(model, layers, [p for p in patterns if p != AUTO], "repair.blocks")
    candidates = dict.fromkeys(named)
    if AUTO in patterns:
        inside = {name: m for name, m in modules.items() if any(one.startswith(f"{name}.") for one in layers)}
        candidates |= dict.fromkeys(sorted(repeated_blocks(model, inside)))
    acts = [name for name, module in modules.items() if isinstance(module, ACTIVATIONS)]
    calls = _watch(model, {name: modules[name] for name in (*candidates, *layers, *acts)}, inputs)
    bad = next((name for name in named if not calls[name].usable), None)
    if bad is not None:
        raise UserError(f"repair.blocks: {bad!r} does not map one tensor to one tensor, once: name others")
    usable = [name for name in candidates if calls[name].usable]
    outer = [name for name in usable if not any(name.startswith(f"{other}.") for other in usable)]
    covered = {layer for layer in layers if any(layer.startswith(f"{name}.") for name in outer)}
    alone = [name for name in layers if name not in covered]
    starts = sorted([*outer, *(n for n in alone if calls[n].usable)], key=lambda name: calls[name].order)
    units = list(_chained(starts, layers, calls, acts))
    return units, [name for name in alone if not calls[name].usable]


def _chained(
    starts: Sequence[str], layers: Collection[str], calls: Mapping[str, _Calls], acts: Sequence[str]
) -> Iterator[Unit]:
    outputs: dict[tuple[int, int], str] = {}
    readers = {_key(calls[name].given): name for name in acts if calls[name].usable}
    for name in starts:
        names = [name]
        if name in layers and _key(calls[name].made) in readers:
            names.append(readers[_key(calls[name].made)])
        inside = tuple(layer for layer in layers if layer == name or layer.startswith(f"{name}."))
        yield Unit(tuple(names), inside, outputs.get(_key(calls[name].given)))
        outputs[_key(calls[names[-1]].made)] = name


def _key(seen: tuple[Tensor, int] | None) -> tuple[int, int]:
    return (0, 0) if seen is None else (id(seen[0]), seen[1])


@torch.no_grad()
def _watch(model: nn.Module, watched: Mapping[str, nn.Module], inputs: Any) -> dict[str, _Calls]:
    """Run one batch; the tensors seen stay alive with the result, so that identities mean something."""
    calls = {name: _Calls() for name in watched}
    clock = iter(range(1 << 62))
    handles = []

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen = calls[name]
            seen.count, seen.order = seen.count + 1, next(clock)
            seen.plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            seen.given = (args[0], args[0]._version) if seen.plain else None

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[name].made = (output, output._version) if isinstance(output, Tensor) else None

        return hook

    for name, module in watched.items():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def capturing(model: nn.Module, unit: Unit, given: Any, made: Any) -> Iterator[Any]:
    """Hand the unit's input to ``given`` and its output to ``made`` (None: not wanted).

    Yields:
        A function that runs a batch through ``model``, as far as the unit.
    """

    def before(module: nn.Module, args: Any) -> None:
        if given is not None:
            given(args[0])
        if made is None:
            raise Enough

    def after(module: nn.Module, args: Any, output: Any) -> None:
        made(output)
        raise Enough

    first, last = (model.get_submodule(unit.modules[k]) for k in (0, -1))
    handles = [first.register_forward_pre_hook(before, prepend=True)]
    if made is not None:
        handles.append(last.register_forward_hook(after))

    try:
        yield partial(run_until_enough, model)
    finally:
        for handle in handles:
            handle.remove()

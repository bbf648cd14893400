"""On which grid what a layer or an addition gives is read, where it is one grid of eight bits.

An integer kernel scales its sum to the grid of what comes next, so that it has to know it. Seen in one
pass of the float network (:mod:`dqss.points.watch`); rectifiers in between are taken in by the ends of
the integers, and so are functions that only move values about.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqss.attach import attach_input, detach_input
from dqss.bundle import Bundle
from dqss.choice import OUTPUT
from dqss.layers import searchable_layers
from dqss.measure import home
from dqss.mixing import Grid
from dqss.points.watch import Seen, Value, Watch, Watched
from dqss.products.find import ProductFinder
from dqss.products.meet import Meeting, as_meeting
from dqss.spec import PerTensor

BITS = 8


def grids_of(bundle: Bundle, place: torch.device) -> dict[str, Grid]:
    """The grid of every quantizer, by its name: ``conv1.activation``, ``layer1.0.point0.left``."""
    found = {}
    for name, role, choice in bundle.strategy.choices():
        scale, zero_point = (bundle.tensors[f"{name}.{role}.{part}"] for part in ("scale", "zero_point"))
        found[f"{name}.{role}"] = Grid(scale.to(place), zero_point.to(place), choice.candidate().spec)
    return found


def is_bytes(grid: Grid) -> bool:
    """Whether a grid is one of eight bits for a whole tensor."""
    return grid.spec.bits == BITS and isinstance(grid.spec.granularity, PerTensor)


@dataclass(frozen=True)
class Reading:
    """What is read how.

    Attributes:
        outputs: the grids on which results are read, by the name of the layer or point that gives them;
            without those that something reads that takes real numbers, or that are read on several grids.
        axes: how many axes the input of each layer has.
    """

    outputs: dict[str, Grid]
    axes: dict[str, int]


def reading(model: nn.Module, bundle: Bundle, example: Any) -> Reading:
    """Watch one pass.

    Args:
        model: the prepared network in float, nothing attached; it comes back as it was.
        bundle: whose quantizers will be put on it.
        example: one batch.
    """
    (seen, axes), grids = _watched(model, bundle, example), grids_of(bundle, home(model))
    reads: dict[Value, list[str]] = defaultdict(list)
    for layer, values in seen.readers.items():
        for value in values:
            reads[value].append(f"{layer}.activation")
    bare = {value for value in seen.values if value.bare}
    for meet in seen.meetings:
        for operand, value in meet.operands.items():
            name = f"{meet.place.name}.{operand}"
            if name in grids:
                reads[value].append(name)
            else:
                bare.add(value)
    givers: dict[str, list[Value]] = defaultdict(list)
    for value in seen.values:
        for giver in _givers(value):
            givers[giver].append(value)
    points = {n: f"{n}.{OUTPUT}" for n, point in bundle.strategy.points.items() if point.kind == OUTPUT}
    found: dict[str, Grid | None] = {
        name: None if bare & set(values) else _common(grids[q] for value in values for q in reads[value])
        for name, values in givers.items()
    }
    # Whatever reads such an output, reads it quantized.
    found |= {name: _common([grids[quantizer]]) for name, quantizer in points.items()}
    return Reading({name: grid for name, grid in found.items() if grid is not None}, axes)


def _watched(model: nn.Module, bundle: Bundle, example: Any) -> tuple[Seen, dict[str, int]]:
    layers = searchable_layers(model)
    names = [name for name, layer in bundle.strategy.layers.items() if layer.activation is not None]
    probes = {name: _Probe() for name in names}
    ends = [name for name in names if bundle.strategy.layers[name].weight is not None]
    watched = {name: Watched(layers[name][0], probe) for name, probe in probes.items()}
    watch = Watch(watched, ends, products=False)
    finder = ProductFinder[Meeting](model, lambda place, meeting: watch.meet(place), as_meeting, "point")
    try:
        for each in watched.values():
            attach_input(each.layer, each.quantizer)
        watch.run(model, example, finder)
    finally:
        for each in watched.values():
            detach_input(each.layer)
    return watch.seen, {name: probe.axes for name, probe in probes.items()}


class _Probe(nn.Module):
    """Where a quantizer will be."""

    axes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.axes = x.ndim
        return x


def _givers(value: Value) -> Iterator[str]:
    yield from value.ends
    for place in value.places:
        yield place.name


def _common(grids: Iterable[Grid]) -> Grid | None:
    """The grid that all of them are, if it is one of eight bits."""
    known = list(grids)
    alike = all(_same(known[0], grid) for grid in known)
    return known[0] if known and alike and is_bytes(known[0]) else None


def _same(one: Grid, other: Grid) -> bool:
    parts = zip((one.scale, one.zero_point), (other.scale, other.zero_point), strict=True)
    return one.spec == other.spec and all(torch.equal(a, b) for a, b in parts)

"""Points under search: their candidates, and what they are observed with while calibrating."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from dqss.attach import attach_output, detach_output
from dqss.choice import OUTPUT, PointKind
from dqss.decision import Decision
from dqss.mixed import MixedActivation, Mode
from dqss.points.plan import Plan, of_one_tensor, plan
from dqss.points.watch import Watch, Watched
from dqss.products.attach import ProductQuantizer, attach_products, detach_products
from dqss.products.find import Place, ProductFinder
from dqss.products.meet import Meeting, as_meeting
from dqss.space import LayerInfo, SearchSpace, point_info
from dqss.spec import Candidate

Created = Callable[[str, nn.Module], None]


@dataclass
class SearchablePoint:
    """A point under search.

    Attributes:
        info: its name; for the output of a layer, the layer's.
        kind: as in :class:`dqss.choice.PointStrategy`.
        owner: the module in whose forward it is, or the layer.
        quantizers: of its operands, or of the output.
        meeting: what the owner's forward quantizes them with; None for an output.
    """

    info: LayerInfo
    kind: PointKind
    owner: nn.Module
    quantizers: Mapping[str, MixedActivation]
    meeting: ProductQuantizer | None = None

    def operands(self) -> Iterator[tuple[str, MixedActivation]]:
        """What quantizes each operand, by its name."""
        yield from self.quantizers.items()


class PointLayer(Protocol):
    """A layer of the supernet, as points look at it."""

    info: LayerInfo
    module: nn.Module

    @property
    def weight(self) -> nn.Module | None:
        """What quantizes its weight."""

    @property
    def activation(self) -> nn.Module | None:
        """What quantizes its input."""


@dataclass
class PointSearch:
    """Finds points before a float network is calibrated, and observes them meanwhile.

    Args:
        model: the network.
        space: says whether points are searched, and among which candidates.
        layers: under search, by name.
        created: called with a label for people and each new quantizer.
    """

    model: nn.Module
    space: SearchSpace
    layers: Mapping[str, PointLayer]
    created: Created
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._finder = ProductFinder[Meeting](self.model, self._see, as_meeting, "point")
        self._plan = Plan((), (), (), {})
        self._watch: Watch | None = None
        self._meetings: dict[Place, ProductQuantizer | None] = {}
        self._outputs: dict[str, SearchablePoint] = {}

    def find(self, example: Any) -> None:
        """Run ``example`` once, in float, and put observers on the outputs that need a point."""
        points = self.space.points
        if points is None:
            return
        quantized = {n: Watched(p.module, p.activation) for n, p in self.layers.items() if p.activation}
        ends = [
            name
            for name, layer in self.layers.items()
            if layer.weight is not None and name in quantized and set(points.layers) & set(layer.info.types)
        ]
        self._watch = Watch(quantized, ends, self.space.products)
        self._watch.run(self.model, example, self._finder)
        seen, self._watch = self._watch.seen, None
        self._plan = plan(seen, self._finder.searchable)
        for name in self._plan.outputs:
            self._observe_output(name, self.layers[name])

    def watching(self) -> AbstractContextManager[None]:
        """To be around the forward pass of every batch."""
        return self._finder.watching() if self._plan.places else nullcontext()

    def infos(self) -> list[LayerInfo]:
        """All meetings that may be quantized, as a search space looks at them."""
        return [point_info(place.name) for place in self._plan.places]

    def attach(self) -> dict[str, SearchablePoint]:
        """Put the observed quantizers in place."""
        found: dict[str, SearchablePoint] = {}
        by_owner: dict[nn.Module, dict[int, ProductQuantizer]] = {}
        for place, meeting in self._meetings.items():
            if meeting is not None and self._finder.searchable(place):
                operands: Any = dict(meeting.operands.items())
                kind: Any = meeting.kind
                info = point_info(place.name)
                found[place.name] = SearchablePoint(info, kind, place.owner, operands, meeting)
                by_owner.setdefault(place.owner, {})[place.index] = meeting
        for owner, meetings in by_owner.items():
            attach_products(owner, meetings)
        found |= self._outputs
        for point in found.values():
            for _, quantizer in point.operands():
                quantizer.mode = Mode.FLOAT
        return found

    def hidden(self) -> list[str]:
        """Meetings that should be quantized and cannot be."""
        varying = (place for place in self._meetings if not self._finder.searchable(place))
        return list(dict.fromkeys(place.name for place in (*self._plan.hidden, *varying)))

    def of_one_tensor(self, names: Iterable[str]) -> list[list[str]]:
        """See :func:`dqss.points.plan.of_one_tensor`."""
        return of_one_tensor(self._plan.readers, names)

    # -- observing ----------------------------------------------------------------------------

    @torch.no_grad()
    def _see(self, place: Place, meeting: Meeting) -> None:
        if self._watch is not None:
            self._watch.meet(place)
            return
        if place not in self._plan.places:
            return
        if place not in self._meetings:
            self._meetings[place] = self._create(place, meeting)
        quantizer = self._meetings[place]
        if quantizer is not None:
            meeting.show(quantizer.quantize)

    def _create(self, place: Place, meeting: Meeting) -> ProductQuantizer | None:
        candidates = self.space.point_candidates(point_info(place.name))
        if candidates is None:
            self.skipped.append(place.name)
            return None
        operands = {name: self._quantizer(place.name, name, candidates) for name in meeting.names}
        return ProductQuantizer(place.name, meeting.kind, operands).to(meeting.given[0].device)

    def _observe_output(self, name: str, layer: PointLayer) -> None:
        candidates = self.space.point_candidates(layer.info)
        if candidates is None:
            return
        weight: Any = layer.module.weight
        quantizer = self._quantizer(name, OUTPUT, candidates).to(weight.device)
        attach_output(layer.module, quantizer)
        self._outputs[name] = SearchablePoint(layer.info, OUTPUT, layer.module, {OUTPUT: quantizer})

    def _quantizer(self, name: str, operand: str, candidates: tuple[Candidate, ...]) -> MixedActivation:
        decision = Decision(f"{name}.{operand}", candidates)
        quantizer = MixedActivation(candidates, decision, torch.Size([1]))  # per tensor: any shape
        quantizer.mode = Mode.OBSERVE
        self.created(f"{operand} of {name!r}", quantizer)
        return quantizer


def forget(points: dict[str, SearchablePoint]) -> None:
    """Take all points off their modules."""
    for point in points.values():
        if point.meeting is None:
            detach_output(point.owner)
        else:
            detach_products(point.owner, [point.meeting])
    points.clear()

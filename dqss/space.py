"""Which layers are searched, and among which candidates: ordered rules, no torch.

A search space does not know the network. Rules match layer names (shell patterns) and types
(class names, base classes included); the first rule that matches a layer decides it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dqss.errors import SearchSpaceError, near_match
from dqss.spec import Candidate, PerGroup, PerTensor


@dataclass(frozen=True)
class LayerInfo:
    """What a rule may look at.

    Attributes:
        name: dotted module name.
        types: class names of the layer and of its bases, most derived first.
        weight_axis: output-channel axis of its weight.
        input_axis: channel axis of its input, counted from the end.
    """

    name: str
    types: tuple[str, ...]
    weight_axis: int
    input_axis: int


@dataclass(frozen=True)
class Rule:
    """Candidates for the layers whose name matches one of ``names`` and type one of ``types``.

    Empty ``types`` matches all types. ``PerChannel`` and ``PerGroup`` in a candidate mean the
    layer's own channel axis, whatever axis they were written with. ``skip`` leaves the layers in float.
    """

    weight: tuple[Candidate, ...] = ()
    activation: tuple[Candidate, ...] = ()
    names: tuple[str, ...] = ("*",)
    types: tuple[str, ...] = ()
    skip: bool = False

    def matches(self, layer: LayerInfo) -> bool:
        """Whether this rule speaks about ``layer``."""
        named = any(fnmatchcase(layer.name, pattern) for pattern in self.names)
        return named and (not self.types or any(kind in layer.types for kind in self.types))


@dataclass(frozen=True)
class LayerCandidates:
    """Resolved candidates of one layer; either tuple may be empty."""

    weight: tuple[Candidate, ...]
    activation: tuple[Candidate, ...]


@dataclass(frozen=True)
class SearchSpace:
    """Ordered rules; a layer that none matches stays in float."""

    name: str
    rules: tuple[Rule, ...]

    def candidates(self, layer: LayerInfo) -> LayerCandidates | None:
        """Candidates of ``layer``, or None where it stays in float.

        Raises:
            SearchSpaceError: where activations are to be quantized per group, or a candidate is
                listed twice.
        """
        rule = next((rule for rule in self.rules if rule.matches(layer)), None)
        if rule is None or rule.skip or not (rule.weight or rule.activation):
            return None
        grouped = next((c for c in rule.activation if isinstance(c.spec.granularity, PerGroup)), None)
        if grouped is not None:
            raise SearchSpaceError(
                f"search space {self.name!r}: {grouped.title} for the activation of layer {layer.name!r}: "
                "groups are for weights; quantize activations per tensor or per channel"
            )
        return LayerCandidates(
            _with_axis(rule.weight, layer.weight_axis), _with_axis(rule.activation, layer.input_axis)
        )

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse patterns and types that match nothing: they are typing mistakes.

        Raises:
            SearchSpaceError: naming the pattern and the closest layer name.
        """
        known_types = {kind for layer in layers for kind in layer.types}
        for rule in self.rules:
            for pattern in rule.names:
                if not any(fnmatchcase(layer.name, pattern) for layer in layers):
                    hint = near_match(pattern, [layer.name for layer in layers])
                    raise SearchSpaceError(f"search space {self.name!r}: no layer matches {pattern!r}{hint}")
            for kind in rule.types:
                if kind not in known_types:
                    raise SearchSpaceError(
                        f"search space {self.name!r}: no layer is a {kind!r}{near_match(kind, known_types)}"
                    )
        if not any(self.candidates(layer) for layer in layers):
            raise SearchSpaceError(
                f"search space {self.name!r} matches none of the model's {len(layers)} layers; "
                "loosen its names and types"
            )


def _with_axis(candidates: Iterable[Candidate], axis: int) -> tuple[Candidate, ...]:
    def place(candidate: Candidate) -> Candidate:
        granularity = candidate.spec.granularity
        if isinstance(granularity, PerTensor):
            return candidate
        spec = dataclasses.replace(candidate.spec, granularity=dataclasses.replace(granularity, axis=axis))
        return dataclasses.replace(candidate, spec=spec)

    placed = tuple(place(candidate) for candidate in candidates)
    twin = next((candidate for candidate in placed if placed.count(candidate) > 1), None)
    if twin is not None:
        raise SearchSpaceError(f"a search space lists the same candidate twice: {twin.title}")
    return placed

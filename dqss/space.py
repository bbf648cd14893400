"""Which layers are searched, and among which candidates: ordered rules, no torch.

A search space does not know the network. Rules match layer names (shell patterns) and types
(class names, base classes included); the first rule that matches a layer decides it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
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


class TieKind(Enum):
    """What tensors are found to share a decision.

    Attributes:
        INPUTS: of layers that read one and the same tensor: queries, keys and values; both ways of a
            residual block.
        RESIDUAL: weights, and inputs, of layers whose outputs meet in one addition or concatenation,
            directly or by way of norms, activations and the like.
    """

    INPUTS = "inputs"
    RESIDUAL = "residual"


PRODUCT = "Product"
"""The type of a product of two activations, for rules."""


def product_info(name: str) -> LayerInfo:
    """A product of two activations as rules look at it; its axes mean nothing."""
    return LayerInfo(name, (PRODUCT,), weight_axis=0, input_axis=-1)


POINT = "Point"
"""The type of a point, for rules."""


def point_info(name: str) -> LayerInfo:
    """An addition, concatenation or average as rules look at it; its axes mean nothing."""
    return LayerInfo(name, (POINT,), weight_axis=0, input_axis=-1)


@dataclass(frozen=True)
class Points:
    """Where tensors are quantized beside the inputs of layers, because a runtime needs it.

    Its kernels compute integers from integers. What a layer of ``layers`` gives is quantized before
    anything that the kernel does not take in: as an operand of an addition, a concatenation or an
    average, whose other operands are quantized then too, or else as the layer's output.

    Attributes:
        layers: types of layers whose kernels need it.
    """

    layers: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """Candidates for the layers whose name matches one of ``names`` and type one of ``types``.

    Empty ``types`` matches all types. ``PerChannel`` and ``PerGroup`` in a candidate mean the
    layer's own channel axis, whatever axis they were written with. ``skip`` leaves the layers in float.
    Of a product of two activations, which is no layer but has a name and the type ``Product``, the
    candidates for activations are those of each operand; likewise of an addition, a concatenation or an
    average, of the type ``Point``.
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
    """Ordered rules; a layer that none matches stays in float.

    Attributes:
        name: recorded in the strategy.
        rules: the first that matches a layer decides it.
        products: the rules decide products of two activations too, which otherwise stay in float.
        ties: groups of shell patterns; all tensors that a group matches (``conv1.weight``,
            ``conv1.activation``, ``attn.product0.query``) share one decision.
        found_ties: kinds of groups that are found in the network and share one as well.
        points: where tensors are quantized beside the inputs of layers and products; nowhere by default.
            All readers of one tensor but products share one decision then.
    """

    name: str
    rules: tuple[Rule, ...]
    products: bool = False
    ties: tuple[tuple[str, ...], ...] = ()
    found_ties: tuple[TieKind, ...] = ()
    points: Points | None = None

    def candidates(self, layer: LayerInfo) -> LayerCandidates | None:
        """Candidates of ``layer``, or None where it stays in float.

        Raises:
            SearchSpaceError: where activations are to be quantized per group, or a candidate is
                listed twice.
        """
        rule = self._rule(layer)
        if rule is None or not (rule.weight or rule.activation):
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

    def product_candidates(self, product: LayerInfo) -> tuple[Candidate, ...] | None:
        """Candidates of each operand of a product, or None where it stays in float.

        They are quantized per tensor: no axis of an operand means the same in every product.

        Raises:
            SearchSpaceError: where the rule has other granularities only.
        """
        return self._per_tensor(product, "products", PRODUCT) if self.products else None

    def point_candidates(self, point: LayerInfo) -> tuple[Candidate, ...] | None:
        """The same for a point; for a layer, those of its output."""
        return None if self.points is None else self._per_tensor(point, "points", POINT)

    def _per_tensor(self, info: LayerInfo, kind: str, type_name: str) -> tuple[Candidate, ...] | None:
        rule = self._rule(info)
        if rule is None or not rule.activation:
            return None
        found = tuple(c for c in rule.activation if isinstance(c.spec.granularity, PerTensor))
        if not found:
            way = f"{kind} in float with skip_types=[{type_name}]"
            if type_name not in info.types:  # the output of a layer
                way = f"the layer in float with skip=[{info.name}]"
            raise SearchSpaceError(
                f"search space {self.name!r}: no per-tensor candidate for what is quantized of "
                f"{info.name!r}: give it one, or leave {way}"
            )
        return found

    def _rule(self, layer: LayerInfo) -> Rule | None:
        rule = next((rule for rule in self.rules if rule.matches(layer)), None)
        return None if rule is None or rule.skip else rule

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Refuse patterns and types that match nothing: they are typing mistakes.

        Args:
            layers: all layers; with them the products and points, where those are searched.

        Raises:
            SearchSpaceError: naming the pattern and the closest layer name.
        """
        known_types = {kind for layer in layers for kind in layer.types}
        # A network may have none.
        known_types.update([PRODUCT] if self.products else [], [POINT] if self.points else [])
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

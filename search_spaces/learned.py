"""The same candidates that learn for every layer, for QAT."""

from __future__ import annotations

from collections.abc import Sequence

from dqss.errors import SearchSpaceError
from dqss.search_spaces.uniform import Algorithms, Choices, bit_widths, granularities, named, several
from dqss.space import Rule, SearchSpace
from dqss.spec import Candidate, Granularity, PerTensor, QuantSpec

LEARNED_WEIGHTS: Choices = (("lsq", {}), ("lsq_plus", {}), ("dorefa", {}), ("minmax", {}))
"""Four ways to quantize a weight that learns; the last one keeps the scale that it begins with."""

LEARNED_ACTIVATIONS: Choices = (("lsq", {}), ("lsq_plus", {}), ("pact", {}), ("dorefa", {}))
"""Four ways to quantize an activation. All but LSQ+ are for what is never negative."""

ZERO_POINT = ("lsq_plus",)
"""Those that learn a zero point, on activations; static algorithms have one too."""
SYMMETRIC = ("lsq", "pact", "dorefa", "pams", "dsq", "tqt")
MIRRORED = ("pams",)
"""Those whose range is the same on both sides of zero, on activations."""


def learned(
    weight_bits: int | Sequence[int] = 2,
    activation_bits: int | Sequence[int] = 2,
    weight_algorithms: Algorithms | None = None,
    activation_algorithms: Algorithms | None = None,
    weight_granularity: str | Sequence[str] = "channel",
    edges: Sequence[str] = (),
    edge_bits: int = 8,
    skip: Sequence[str] = (),
    skip_types: Sequence[str] = (),
    name: str = "learned",
) -> SearchSpace:
    """Every algorithm at every bit-width, for all layers; each on the grid that its paper has.

    Weights are symmetric. Activations are unsigned (zero and above: what is negative becomes zero),
    but affine for LSQ+ and the static algorithms, and mirrored for PAMS.

    Args:
        weight_bits, activation_bits: one bit-width or several.
        weight_algorithms, activation_algorithms: names, or ``{"name": ..., **parameters}``;
            :data:`LEARNED_WEIGHTS` and :data:`LEARNED_ACTIVATIONS` by default.
        weight_granularity: ``"tensor"`` or ``"channel"``, or both.
        edges: shell patterns of layers that are not searched but quantized by LSQ and LSQ+ ...
        edge_bits: ... at so many bits: the first and the last layer, often.
        skip: shell patterns of layer names that stay in float.
        skip_types: class names whose layers stay in float.
        name: recorded in the strategy.

    Raises:
        SearchSpaceError: for bits out of range or an unknown granularity.
    """
    if "group" in several(weight_granularity):
        raise SearchSpaceError(
            "weight_granularity=group: scales of groups do not learn; use tensor or channel"
        )
    grains = granularities(several(weight_granularity))
    weight = _weights(named(weight_algorithms or LEARNED_WEIGHTS), bit_widths(weight_bits), grains)
    activation = _activations(
        named(activation_algorithms or LEARNED_ACTIVATIONS), bit_widths(activation_bits)
    )
    rules = []
    if skip:
        rules.append(Rule(names=tuple(skip), skip=True))
    if skip_types:
        rules.append(Rule(types=tuple(skip_types), skip=True))
    if edges:
        widths = bit_widths(edge_bits)
        edge = _weights([("lsq", {})], widths, grains[:1]), _activations([("lsq_plus", {})], widths)
        rules.append(Rule(*edge, names=tuple(edges)))
    return SearchSpace(name, (*rules, Rule(weight, activation)))


def _weights(
    algorithms: Sequence[tuple[str, dict[str, float]]], bits: Sequence[int], grains: Sequence[Granularity]
) -> tuple[Candidate, ...]:
    return tuple(
        Candidate.of(name, QuantSpec(width, True, grain), params)
        for width in bits
        for grain in grains
        for name, params in algorithms
    )


def _activations(
    algorithms: Sequence[tuple[str, dict[str, float]]], bits: Sequence[int]
) -> tuple[Candidate, ...]:
    def spec(name: str, width: int) -> QuantSpec:
        symmetric = name in SYMMETRIC
        return QuantSpec(width, symmetric, PerTensor(), signed=not symmetric or name in MIRRORED)

    return tuple(
        Candidate.of(name, spec(name, width), params) for width in bits for name, params in algorithms
    )

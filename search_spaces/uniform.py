"""The same candidates for every layer: algorithms x bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dqss.errors import SearchSpaceError, near_match
from dqss.space import Rule, SearchSpace, TieKind
from dqss.spec import MAX_BITS, MIN_BITS, Candidate, Granularity, PerChannel, PerGroup, PerTensor, QuantSpec

Algorithms = Sequence[str | dict[str, Any] | tuple[str, dict[str, float]]]

Choices = tuple[tuple[str, dict[str, float]], ...]

STANDARD_WEIGHTS: Choices = (
    ("minmax", {}),
    ("percentile", {"p": 99.0}),
    ("percentile", {"p": 97.0}),
    ("percentile", {"p": 95.0}),
    ("mse", {}),
    ("lp", {"p": 3.0}),
    ("aciq_gaussian", {}),
    ("aciq_laplace", {}),
)
"""Eight ways to clip a weight. A channel often has some hundred values: percentiles nearer to 100
would be min-max again."""

STANDARD_ACTIVATIONS: Choices = (
    ("minmax", {}),
    ("percentile", {"p": 99.9}),
    ("percentile", {"p": 99.5}),
    ("percentile", {"p": 99.0}),
    ("mse", {}),
    ("lp", {"p": 3.0}),
    ("aciq_gaussian", {}),
    ("aciq_laplace", {}),
)
"""Eight ways to clip an activation."""


def uniform(
    weight_bits: int | Sequence[int] = 4,
    activation_bits: int | Sequence[int] = 4,
    weight_algorithms: Algorithms | None = None,
    activation_algorithms: Algorithms | None = None,
    weight_granularity: str | Sequence[str] = "channel",
    activation_granularity: str | Sequence[str] = "tensor",
    weight_symmetric: bool | Sequence[bool] = True,
    activation_symmetric: bool | Sequence[bool] = False,
    activation_signed: bool | Sequence[bool] = True,
    weight_group_size: int | Sequence[int] = 32,
    edges: Sequence[str] = (),
    edge_bits: int | Sequence[int] = 8,
    skip: Sequence[str] = (),
    skip_types: Sequence[str] = (),
    force: Sequence[str] = (),
    force_types: Sequence[str] = (),
    products: bool = False,
    ties: Sequence[Sequence[str]] = (),
    find_ties: Sequence[str] = (),
    name: str = "uniform",
) -> SearchSpace:
    """Every algorithm at every bit-width on every kind of grid, for all layers.

    Args:
        weight_bits, activation_bits: one bit-width or several.
        weight_algorithms, activation_algorithms: names, or ``{"name": ..., **parameters}``;
            :data:`STANDARD_WEIGHTS` and :data:`STANDARD_ACTIVATIONS` by default. Of those for weights
            ``adaround`` is prepared before the search: for n weights that make one output, some n^2
            multiply-accumulates at each of at most 256 places of every input, which a dry run adds up.
        weight_granularity, activation_granularity: ``"tensor"``, ``"channel"``, for weights also
            ``"group"``; one or several.
        weight_symmetric, activation_symmetric: zero point 0, or affine; one or both.
        activation_signed: symmetric grids around zero, or from zero on; one or both.
        weight_group_size: neighbouring values that share a scale, with the granularity
            ``"group"``; one size or several.
        edges: shell patterns of layers that are searched among the same algorithms ...
        edge_bits: ... but at so many bits: the first and the last layer, often.
        skip: shell patterns of layer names that stay in float.
        skip_types: class names whose layers stay in float; ``Point`` for additions, concatenations and
            averages, which are searched where a target needs it.
        force, force_types: patterns and class names of layers that are searched although
            ``skip`` or ``skip_types`` say no.
        products: also search the operands of products of two activations (queries by keys,
            probabilities by values), per tensor. ``skip`` knows them by names such as
            ``blocks.0.attn.product0``, ``skip_types`` by the type ``Product``.
        ties: groups of patterns of tensors (``layer1.*.conv1.weight``, ``*.activation``) that share
            one decision.
        find_ties: kinds of such groups that are found in the network: ``"inputs"``, ``"residual"``; see
            :class:`dqss.space.TieKind`.
        name: recorded in the strategy.

    Raises:
        SearchSpaceError: for bits or groups out of range, an unknown granularity, or options that
            contradict each other.
    """
    if several(activation_signed) != [True] and True not in several(activation_symmetric):
        raise SearchSpaceError("activation_signed is for symmetric grids: set activation_symmetric=true too")
    if "group" in several(activation_granularity):
        raise SearchSpaceError("activation_granularity: groups are for weights; use tensor or channel")
    if not isinstance(products, bool):
        raise SearchSpaceError(f"products={products!r}: expected true or false")
    if products and "tensor" not in several(activation_granularity):
        raise SearchSpaceError("products are quantized per tensor: add tensor to activation_granularity")
    grids = _Grids(
        weight_algorithms or STANDARD_WEIGHTS,
        activation_algorithms or STANDARD_ACTIVATIONS,
        granularities(several(weight_granularity), several(weight_group_size)),
        granularities(several(activation_granularity)),
        several(weight_symmetric),
        several(activation_symmetric),
        several(activation_signed),
    )
    weight, activation = grids.at(weight_bits, activation_bits)
    rules = []
    if force:
        rules.append(Rule(weight, activation, names=tuple(force)))
    if force_types:
        rules.append(Rule(weight, activation, types=tuple(force_types)))
    if skip:
        rules.append(Rule(names=tuple(skip), skip=True))
    if skip_types:
        rules.append(Rule(types=tuple(skip_types), skip=True))
    if edges:
        rules.append(Rule(*grids.at(edge_bits, edge_bits), names=tuple(edges)))
    groups = tuple(tuple(group) for group in ties if _is_group(group))
    return SearchSpace(name, (*rules, Rule(weight, activation)), products, groups, _kinds(find_ties))


@dataclass(frozen=True)
class _Grids:
    """The candidates of a layer, but for their bits."""

    weight_algorithms: Algorithms
    activation_algorithms: Algorithms
    weight_grains: list[Granularity]
    activation_grains: list[Granularity]
    weight_symmetric: list[bool]
    activation_symmetric: list[bool]
    activation_signed: list[bool]

    def at(
        self, weight_bits: int | Sequence[int], activation_bits: int | Sequence[int]
    ) -> tuple[tuple[Candidate, ...], tuple[Candidate, ...]]:
        """Of weight and activation, at one or several bit-widths each."""
        weight = _candidates(self.weight_algorithms, weight_bits, self.weight_grains, self.weight_symmetric)
        activation = _candidates(
            self.activation_algorithms,
            activation_bits,
            self.activation_grains,
            self.activation_symmetric,
            self.activation_signed,
        )
        return weight, activation


def _candidates(
    algorithms: Algorithms,
    bits: int | Sequence[int],
    granularities: Sequence[Granularity],
    symmetric: Sequence[bool],
    signed: Sequence[bool] = (True,),
) -> tuple[Candidate, ...]:
    widths = bit_widths(bits)
    signs = [(True, sign) for sign in signed] if True in symmetric else []
    signs += [(False, True)] if False in symmetric else []
    if not (signs and granularities):
        raise SearchSpaceError("symmetric, signed and granularity: expected at least one of each, not []")
    return tuple(
        Candidate.of(name, QuantSpec(width, around_zero, grain, sign), params)
        for width in widths
        for grain in granularities
        for around_zero, sign in signs
        for name, params in named(algorithms)
    )


def bit_widths(bits: int | Sequence[int]) -> list[int]:
    """One or several bit-widths, each checked."""
    widths = several(bits)
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, int) or not MIN_BITS <= width <= MAX_BITS:
            raise SearchSpaceError(f"bits={width!r}: expected an integer from {MIN_BITS} to {MAX_BITS}")
    if not widths:
        raise SearchSpaceError("bits=[]: expected at least one width")
    return widths


def granularities(words: Sequence[str], sizes: Sequence[int] = ()) -> list[Granularity]:
    """The types that words mean: tensor, channel, group."""
    found: list[Granularity] = []
    for word in words:
        if word == "group":
            for size in sizes:
                if not isinstance(size, int) or size < 1:
                    raise SearchSpaceError(f"weight_group_size={size!r}: expected an integer of 1 or more")
            found += [PerGroup(size) for size in sizes]
        elif word in ("tensor", "channel"):
            found.append(PerTensor() if word == "tensor" else PerChannel())
        else:
            raise SearchSpaceError(f"granularity {word!r}: expected one of tensor, channel, group")
    return found


def _is_group(group: Any) -> bool:
    if isinstance(group, str) or not isinstance(group, Sequence) or not group:
        raise SearchSpaceError(
            f"ties: {group!r}: expected groups, each a list of patterns: [[a.weight, b.*]]"
        )
    return True


def _kinds(words: Sequence[str]) -> tuple[TieKind, ...]:
    known = [kind.value for kind in TieKind]
    for word in several(words):
        if word not in known:
            raise SearchSpaceError(f"find_ties: {word!r}{near_match(str(word), known)}: expected {known}")
    return tuple(TieKind(word) for word in several(words))


def several(value: Any) -> list[Any]:
    """One or several, as a list; a word is one."""
    return [value] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)


def named(algorithms: Algorithms) -> list[tuple[str, dict[str, float]]]:
    """Names with parameters, however they were written."""
    if not isinstance(algorithms, Sequence) or isinstance(algorithms, str):
        raise SearchSpaceError(f"algorithms={algorithms!r}: expected a list, such as [{algorithms!r}]")
    found: list[tuple[str, dict[str, float]]] = []
    for entry in algorithms:
        if isinstance(entry, str):
            found.append((entry, {}))
        elif isinstance(entry, tuple):
            found.append(entry)
        elif "name" in entry:
            found.append((entry["name"], {key: value for key, value in entry.items() if key != "name"}))
        else:
            raise SearchSpaceError(f"algorithm {entry}: expected a name or {{name: ..., parameter: ...}}")
    return found

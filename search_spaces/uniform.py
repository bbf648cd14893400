"""The same candidates for every layer: algorithms x bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dqss.errors import SearchSpaceError
from dqss.space import Rule, SearchSpace
from dqss.spec import MAX_BITS, MIN_BITS, Candidate, Granularity, PerChannel, PerTensor, QuantSpec

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
    weight_granularity: str = "channel",
    activation_granularity: str = "tensor",
    weight_symmetric: bool = True,
    activation_symmetric: bool = False,
    skip: Sequence[str] = (),
    skip_types: Sequence[str] = (),
    force: Sequence[str] = (),
    force_types: Sequence[str] = (),
    name: str = "uniform",
) -> SearchSpace:
    """Every algorithm at every bit-width, for all layers.

    Args:
        weight_bits, activation_bits: one bit-width or several.
        weight_algorithms, activation_algorithms: names, or ``{"name": ..., **parameters}``;
            :data:`STANDARD_WEIGHTS` and :data:`STANDARD_ACTIVATIONS` by default.
        weight_granularity, activation_granularity: ``"tensor"`` or ``"channel"``.
        weight_symmetric, activation_symmetric: signed grid around zero, or affine.
        skip: shell patterns of layer names that stay in float.
        skip_types: class names whose layers stay in float.
        force, force_types: patterns and class names of layers that are searched although
            ``skip`` or ``skip_types`` say no.
        name: recorded in the strategy.

    Raises:
        SearchSpaceError: for bits out of range or an unknown granularity.
    """
    weight = _candidates(
        weight_algorithms or STANDARD_WEIGHTS, weight_bits, weight_granularity, weight_symmetric
    )
    activation = _candidates(
        activation_algorithms or STANDARD_ACTIVATIONS,
        activation_bits,
        activation_granularity,
        activation_symmetric,
    )
    rules = []
    if force:
        rules.append(Rule(weight, activation, names=tuple(force)))
    if force_types:
        rules.append(Rule(weight, activation, types=tuple(force_types)))
    if skip:
        rules.append(Rule(names=tuple(skip), skip=True))
    if skip_types:
        rules.append(Rule(types=tuple(skip_types), skip=True))
    return SearchSpace(name, (*rules, Rule(weight, activation)))


def _candidates(
    algorithms: Algorithms, bits: int | Sequence[int], granularity: str, symmetric: bool
) -> tuple[Candidate, ...]:
    widths = [bits] if isinstance(bits, (int, float)) else list(bits)
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, int) or not MIN_BITS <= width <= MAX_BITS:
            raise SearchSpaceError(f"bits={width!r}: expected an integer from {MIN_BITS} to {MAX_BITS}")
    if not widths:
        raise SearchSpaceError("bits=[]: expected at least one width")
    grain = _granularity(granularity)
    return tuple(
        Candidate.of(name, QuantSpec(width, symmetric, grain), params)
        for width in widths
        for name, params in _algorithms(algorithms)
    )


def _granularity(word: str) -> Granularity:
    known: dict[str, Granularity] = {"tensor": PerTensor(), "channel": PerChannel()}
    if word not in known:
        raise SearchSpaceError(f"granularity {word!r}: expected one of {', '.join(known)}")
    return known[word]


def _algorithms(algorithms: Algorithms) -> list[tuple[str, dict[str, float]]]:
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

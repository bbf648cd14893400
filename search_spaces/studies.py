"""Search spaces of the studies in ``experiments/``, frozen: changing a default changes no study.

All layers and the input, per-channel symmetric weights, per-tensor affine activations. The spaces
of two, four, eight and sixteen candidates a side contain one another.
"""

from __future__ import annotations

from typing import Any

from dqss.search_spaces.uniform import uniform
from dqss.space import SearchSpace

Algorithms = list[str | dict[str, Any]]

TWO: Algorithms = ["minmax", "mse"]
FOUR_WEIGHTS: Algorithms = [*TWO, {"name": "percentile", "p": 99.0}, "aciq_laplace"]
FOUR_ACTIVATIONS: Algorithms = [*TWO, {"name": "percentile", "p": 99.9}, "aciq_laplace"]
EIGHT_WEIGHTS: Algorithms = [
    "minmax",
    {"name": "percentile", "p": 99.0},
    {"name": "percentile", "p": 97.0},
    {"name": "percentile", "p": 95.0},
    "mse",
    {"name": "lp", "p": 3.0},
    "aciq_gaussian",
    "aciq_laplace",
]
EIGHT_ACTIVATIONS: Algorithms = [
    "minmax",
    {"name": "percentile", "p": 99.9},
    {"name": "percentile", "p": 99.5},
    {"name": "percentile", "p": 99.0},
    "mse",
    {"name": "lp", "p": 3.0},
    "aciq_gaussian",
    "aciq_laplace",
]
PICTURES_ACTIVATIONS: Algorithms = ["minmax", {"name": "percentile", "p": 99.99}, *EIGHT_ACTIVATIONS[1:]]
"""For networks that enlarge pictures, whose inputs have long tails."""
_BOTH: Algorithms = [{"name": "lp", "p": 2.5}, {"name": "lp", "p": 4.0}, "hessian", "power_of_two"]
SIXTEEN_WEIGHTS: Algorithms = [
    *EIGHT_WEIGHTS,
    *_BOTH,
    *({"name": "percentile", "p": p} for p in (98.0, 96.0, 93.0, 90.0)),
]
SIXTEEN_ACTIVATIONS: Algorithms = [
    *EIGHT_ACTIVATIONS,
    *_BOTH,
    *({"name": "percentile", "p": p} for p in (99.99, 99.7, 98.0, 97.0)),
]


def two(weight_bits: int, activation_bits: int | None = None) -> SearchSpace:
    """Min-max and MSE."""
    return _space("two", TWO, TWO, weight_bits, activation_bits)


def four(weight_bits: int, activation_bits: int | None = None) -> SearchSpace:
    """Four candidates a side."""
    return _space("four", FOUR_WEIGHTS, FOUR_ACTIVATIONS, weight_bits, activation_bits)


def eight(weight_bits: int, activation_bits: int | None = None) -> SearchSpace:
    """Eight candidates a side, at ``weight_bits`` for activations too unless said otherwise."""
    return _space("eight", EIGHT_WEIGHTS, EIGHT_ACTIVATIONS, weight_bits, activation_bits)


def sixteen(weight_bits: int, activation_bits: int | None = None) -> SearchSpace:
    """Sixteen candidates a side."""
    return _space("sixteen", SIXTEEN_WEIGHTS, SIXTEEN_ACTIVATIONS, weight_bits, activation_bits)


def _space(
    name: str, weights: Algorithms, activations: Algorithms, weight_bits: int, activation_bits: int | None
) -> SearchSpace:
    bits = weight_bits if activation_bits is None else activation_bits
    words = f"{weight_bits}" if bits == weight_bits else f"{weight_bits}, {bits}"
    space: SearchSpace = uniform(
        weight_bits,
        bits,
        weight_algorithms=weights,
        activation_algorithms=activations,
        name=f"studies.{name}({words})",
    )
    return space

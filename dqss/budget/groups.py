"""Decisions whose costs depend on one another, as one choice among combinations of their options.

A layer's weight and activation bits multiply in BitOPs. As one choice, with what no combination
needs left out, the pair is a handful of options; an integer program over such choices is solved
many times faster than one over two decisions and variables that link them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dqss.budget.cost import Pair, SumCost

Array = np.ndarray[Any, np.dtype[np.float64]]
Options = Mapping[str, Sequence[int]]
"""Positions of the options that each decision may take."""

MOST_COMBINATIONS = 4096
"""Of one group; beyond, its decisions stay apart and pairs of them are linked."""


@dataclass(frozen=True)
class Group:
    """Decisions that are made as one.

    Attributes:
        names: of the decisions.
        choices: an option of each, for every combination worth a look.
        costs: ``[choices, costs]``, what each adds to every cost.
    """

    names: tuple[str, ...]
    choices: Sequence[tuple[int, ...]]
    costs: Array


def group(options: Options, costs: Sequence[SumCost]) -> tuple[list[Group], list[tuple[int, Pair]]]:
    """Join decisions that share a pair, directly or by others, and leave out what is beaten everywhere.

    Args:
        options: of each decision, at least one.
        costs: the less of each the better.

    Returns:
        The groups, and the pairs (each with the position of its cost) whose decisions are in
        different groups, since there would be too many combinations.
    """
    kept = {name: _undominated(name, indices, costs) for name, indices in options.items()}
    found, loose = list[Group](), list[tuple[int, Pair]]()
    pairs = [(position, pair) for position, cost in enumerate(costs) for pair in cost.pairs]
    for names in _components(options, [pair for _, pair in pairs]):
        inside = [(position, pair) for position, pair in pairs if pair.first in names]
        if math.prod(len(kept[name]) for name in names) <= MOST_COMBINATIONS:
            found.append(_combined(names, kept, costs, inside))
        else:
            found += [_combined((name,), kept, costs, []) for name in names]
            loose += inside
    return found, loose


def _combined(
    names: tuple[str, ...], kept: Options, costs: Sequence[SumCost], pairs: Sequence[tuple[int, Pair]]
) -> Group:
    choices = list(itertools.product(*(kept[name] for name in names)))
    picked = np.array(choices)
    values = np.zeros((len(choices), len(costs)))
    for at, name in enumerate(names):
        for position, cost in enumerate(costs):
            if name in cost.single:
                values[:, position] += cost.single[name].numpy()[picked[:, at]]
    for position, pair in pairs:
        first, second = (picked[:, names.index(name)] for name in (pair.first, pair.second))
        values[:, position] += pair.table.numpy()[first, second]
    # Alone, a decision was looked at with all that it costs together with others.
    best = _front(values) if len(names) > 1 else range(len(choices))
    return Group(names, [choices[k] for k in best], values[list(best)])


def _undominated(name: str, indices: Sequence[int], costs: Sequence[SumCost]) -> list[int]:
    """The options that no other one beats everywhere, whatever the others do."""
    columns = []
    for cost in costs:
        if name in cost.single:
            columns.append(cost.single[name].numpy()[:, None])
        columns += [pair.table.numpy() for pair in cost.pairs if pair.first == name]
        columns += [pair.table.numpy().T for pair in cost.pairs if pair.second == name]
    if not columns:
        return list(indices[:1])
    rows = np.concatenate(columns, axis=1)[list(indices)]
    return [indices[k] for k in _front(rows)]


def _front(rows: Array) -> list[int]:
    """Rows that no other one beats or equals everywhere; the first of those that are alike."""
    order = np.lexsort((*rows.T[::-1],))  # what beats a row comes before it
    kept: list[int] = []
    for k in order.tolist():
        if not kept or not (rows[kept] <= rows[k]).all(1).any():
            kept.append(k)
    return sorted(kept)


def _components(options: Options, pairs: Sequence[Pair]) -> list[tuple[str, ...]]:
    """Decisions that are connected by pairs, in the order of ``options``."""
    leader = {name: name for name in options}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    for pair in pairs:
        leader[find(pair.second)] = find(pair.first)
    found: dict[str, list[str]] = {}
    for name in options:
        found.setdefault(find(name), []).append(name)
    return [tuple(names) for names in found.values()]

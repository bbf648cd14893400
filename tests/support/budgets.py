"""Random costs over a few decisions, and the best assignment by trying all."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import torch

from dqss.budget.cost import Cost, Pair, PeakCost, SumCost
from dqss.budget.solve import Limit

Sizes = dict[str, int]


def sizes(source: random.Random, most: int = 5) -> Sizes:
    """A few decisions with some options each."""
    return {f"d{k}": source.randint(1, 4) for k in range(source.randint(1, most))}


def sum_cost(
    source: random.Random, options: Sizes, name: str, pairs: bool = True, whole: bool = True
) -> SumCost:
    """Single and pairwise costs: whole numbers with many ties, or fractions."""

    def value() -> float:
        return float(source.randint(0, 6)) if whole else source.random()

    single = {
        d: torch.tensor([value() for _ in range(k)], dtype=torch.float64)
        for d, k in options.items()
        if source.random() < 0.8
    }
    joined = [
        Pair(a, b, torch.tensor([[value() for _ in range(options[b])] for _ in range(options[a])]).double())
        for a, b in itertools.combinations(options, 2)
        if pairs and source.random() < 0.4
    ]
    return SumCost(
        name, "", single, tuple(joined), constant=1 + value(), divisor=source.choice([1.0, 3.0, 8.0])
    )


def peak_cost(source: random.Random, options: Sizes) -> PeakCost:
    """Costs of which the largest counts."""
    single = {
        d: torch.tensor([float(source.randint(0, 9)) for _ in range(k)]).double() for d, k in options.items()
    }
    return PeakCost("peak", "", single, constant=float(source.randint(0, 2)), divisor=3.0)


def every(options: Sizes) -> list[dict[str, int]]:
    """All assignments."""
    picks = itertools.product(*(range(k) for k in options.values()))
    return [dict(zip(options, pick, strict=True)) for pick in picks]


def limits(source: random.Random, options: Sizes, costs: Sequence[Cost]) -> list[Limit]:
    """At a value that some assignment has, between two, below all or above all."""
    found = []
    for cost in costs:
        values = sorted({cost.of(one) for one in every(options)})
        most = source.choice(
            [
                source.choice(values),
                sum(source.choices(values, k=2)) / 2,
                values[0] - 0.5,
                values[0],
                values[-1] + 1,
            ]
        )
        found.append(Limit(cost, most))
    return found


def best(objective: SumCost, options: Sizes, kept: Sequence[Limit]) -> float | None:
    """The least objective of what is within all limits, by trying all."""
    values = [objective.of(one) for one in every(options) if all(limit.holds(one) for limit in kept)]
    return min(values, default=None)

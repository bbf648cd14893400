"""What an assignment costs: exactly for one option a decision, in expectation for probabilities.

A cost knows decisions by name and their options by position; what it counts (bytes, operations,
milliseconds) is its maker's affair, see :mod:`dqss.budget.costs`. No network here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Probabilities = Mapping[str, Tensor]
"""Of the options of each decision, fp64 ``[K]``."""


@dataclass(frozen=True)
class Pair:
    """What two decisions cost together: ``table[j, k]`` with option j of the one and k of the other."""

    first: str
    second: str
    table: Tensor


class Cost(ABC):
    """A cost of assignments.

    Attributes:
        name: what people call it, and the option of the command line.
        unit: of its values, for people.
    """

    name: str
    unit: str

    @abstractmethod
    def of(self, assignment: Mapping[str, int]) -> float:
        """The exact cost with one option a decision."""

    @abstractmethod
    def expected(self, probabilities: Probabilities) -> Tensor:
        """The expected cost of independent decisions, differentiable; a scalar, fp64."""

    @abstractmethod
    def prices(self, probabilities: Probabilities) -> dict[str, Tensor]:
        """``[K]`` a decision: the expected cost if it takes option k, but for what all options share."""


@dataclass(frozen=True)
class SumCost(Cost):
    """``(constant + sum of single costs + sum of what pairs cost together) / divisor``.

    Tables hold whole numbers wherever the thing can be counted (bits, operations), so that sums are
    exact and two assignments that cost the same do so to the bit.

    Attributes:
        single: ``[K]`` a decision; decisions that are not there cost nothing by themselves.
        pairs: of two different decisions each.
        constant: what no decision changes.
        divisor: from the tables' unit to :attr:`unit`.
    """

    name: str
    unit: str
    single: Mapping[str, Tensor]
    pairs: tuple[Pair, ...] = ()
    constant: float = 0.0
    divisor: float = 1.0

    def of(self, assignment: Mapping[str, int]) -> float:
        """See :meth:`Cost.of`."""
        parts = [float(table[assignment[name]]) for name, table in self.single.items()]
        parts += [float(pair.table[assignment[pair.first], assignment[pair.second]]) for pair in self.pairs]
        return math.fsum([self.constant, *parts]) / self.divisor

    def expected(self, probabilities: Probabilities) -> Tensor:
        """See :meth:`Cost.expected`: multilinear in the probabilities."""
        parts = [probabilities[name] @ table for name, table in self.single.items()]
        parts += [probabilities[p.first] @ p.table @ probabilities[p.second] for p in self.pairs]
        total = torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)
        return (total + self.constant) / self.divisor

    def prices(self, probabilities: Probabilities) -> dict[str, Tensor]:
        """See :meth:`Cost.prices`: the derivative of the expected cost by each probability."""
        found = {name: table.clone() for name, table in self.single.items()}
        for pair in self.pairs:
            for name, part in (
                (pair.first, pair.table @ probabilities[pair.second]),
                (pair.second, probabilities[pair.first] @ pair.table),
            ):
                found[name] = found[name] + part if name in found else part
        return {name: price / self.divisor for name, price in found.items()}


@dataclass(frozen=True)
class PeakCost(Cost):
    """The largest of what the decisions cost: ``max(constant, single costs) / divisor``.

    Attributes:
        single: ``[K]`` a decision.
        constant: what no decision changes.
        divisor: from the table's unit to :attr:`unit`.
    """

    name: str
    unit: str
    single: Mapping[str, Tensor] = field(default_factory=dict)
    constant: float = 0.0
    divisor: float = 1.0

    def of(self, assignment: Mapping[str, int]) -> float:
        """See :meth:`Cost.of`."""
        parts = [float(table[assignment[name]]) for name, table in self.single.items()]
        return max([self.constant, *parts]) / self.divisor

    def expected(self, probabilities: Probabilities) -> Tensor:
        """The largest of the expected costs: at most the expectation of the largest, which no sum gives."""
        parts = [probabilities[name] @ table for name, table in self.single.items()]
        floor = torch.tensor(self.constant, dtype=torch.float64)
        return torch.stack([*parts, floor]).max() / self.divisor

    def prices(self, probabilities: Probabilities) -> dict[str, Tensor]:
        """What lies above what the others need anyway; pushes down the decisions that make the peak."""
        means = {name: float(probabilities[name] @ table) for name, table in self.single.items()}
        found = {}
        for name, table in self.single.items():
            others = max((mean for other, mean in means.items() if other != name), default=0.0)
            found[name] = (table - max(others, self.constant)).clamp(min=0) / self.divisor
        return found

"""The best assignment within all limits, exactly: a small integer program.

One binary variable a choice of each group of decisions (see :mod:`dqss.budget.groups`); what
decisions of different groups cost together is made linear by a variable for each pair of their
options. The solver works with tolerances, so that each solution is counted again, exactly: one that
is a hair too dear is forbidden, and the search goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from dqss.budget.cost import Cost, Pair, PeakCost, SumCost
from dqss.budget.groups import Group, group

SLACK = 1e-6
"""Relative to a limit, by which the solver may exceed it; what does is then forbidden by name."""
SMALL, GAP = 300, 1e-4
"""Programs of more columns are solved to this share of the objective: the last digits of scores that
were measured on some hundred images are not worth minutes. Limits are kept exactly in any case."""
INFEASIBLE = 2
"""Status of :func:`scipy.optimize.milp`."""


@dataclass(frozen=True)
class Limit:
    """A cost that may not exceed a value."""

    cost: Cost
    most: float

    def holds(self, assignment: Mapping[str, int]) -> bool:
        """Whether an assignment keeps it, exactly."""
        return self.cost.of(assignment) <= self.most

    @property
    def scale(self) -> float:
        """What costs are divided by to be compared with other limits' costs."""
        return self.most or 1.0


def minimize(
    objective: SumCost, options: Mapping[str, int], limits: Sequence[Limit]
) -> dict[str, int] | None:
    """The assignment with the least objective that keeps all limits; None where there is none.

    Args:
        objective: finite, over the decisions of ``options``; from the best of each decision on, so that
            it says what the limits cost.
        options: how many each decision has.
        limits: at the same time.
    """
    allowed = _below_peaks(options, limits)
    if any(not indices for indices in allowed.values()):
        return None
    easy = _separately(objective, allowed)
    if easy is not None and all(limit.holds(easy) for limit in limits):
        return easy
    sums = [(limit.cost, limit.most) for limit in limits if isinstance(limit.cost, SumCost)]
    program = _Program(*group(allowed, [objective, *(cost for cost, _ in sums)]))
    for position, (cost, most) in enumerate(sums):
        program.limit(position + 1, most * cost.divisor - cost.constant)
    while True:
        found = program.solve()
        if found is None or all(limit.holds(found) for limit in limits):
            return found
        program.forbid(found)


def smallest(cost: Cost, options: Mapping[str, int], limits: Sequence[Limit] = ()) -> float | None:
    """The least value that a cost can have while ``limits`` hold; None where they cannot."""
    if isinstance(cost, SumCost):
        found = minimize(cost, options, limits)
        return None if found is None else cost.of(found)
    assert isinstance(cost, PeakCost)
    nothing = SumCost("nothing", "", {})
    values = sorted({cost.constant, *(v for table in cost.single.values() for v in table.tolist())})
    values = [value / cost.divisor for value in values if value >= cost.constant]
    low, high = 0, len(values)  # the first value that can be kept is among values[low:high]
    while low < high:
        middle = (low + high) // 2
        if minimize(nothing, options, [*limits, Limit(cost, values[middle])]) is None:
            low = middle + 1
        else:
            high = middle
    return values[low] if low < len(values) else None


def _below_peaks(options: Mapping[str, int], limits: Sequence[Limit]) -> dict[str, list[int]]:
    """The options of each decision that exceed no limit by themselves."""
    allowed = {name: list(range(count)) for name, count in options.items()}
    for limit in limits:
        cost = limit.cost
        if isinstance(cost, PeakCost):
            for name, table in cost.single.items():
                values = (table / cost.divisor).tolist()
                allowed[name] = [k for k in allowed[name] if values[k] <= limit.most]
            if cost.constant / cost.divisor > limit.most:
                return {name: [] for name in options}
    return allowed


def _separately(objective: SumCost, allowed: Mapping[str, Sequence[int]]) -> dict[str, int] | None:
    """The best option of each decision, the first of equal ones; None where they do not stand alone."""
    if objective.pairs:
        return None
    tables = {name: table.tolist() for name, table in objective.single.items()}

    def best(name: str, indices: Sequence[int]) -> int:
        return min(indices, key=tables[name].__getitem__) if name in tables else indices[0]

    return {name: best(name, indices) for name, indices in allowed.items()}


class _Program:
    """Columns and rows of the integer program; the first cost is the objective.

    Args:
        groups: one choice of each is taken.
        loose: pairs of decisions in different groups, each with the position of its cost.
    """

    def __init__(self, groups: Sequence[Group], loose: Sequence[tuple[int, Pair]]) -> None:
        self.groups = groups
        self.starts = np.cumsum([0, *(len(each.choices) for each in groups)]).tolist()
        self.binary = self.width = self.starts[-1]
        self._rows: list[tuple[dict[int, float], float, float]] = []
        self._at: dict[tuple[str, int], int] = {}
        for start, each in zip(self.starts, groups, strict=False):
            self._rows.append(({start + k: 1.0 for k in range(len(each.choices))}, 1.0, 1.0))
            if len(each.names) == 1:
                self._at.update({(each.names[0], one): start + k for k, (one,) in enumerate(each.choices)})
        costs = np.concatenate([each.costs for each in groups]).T
        self._costs = [dict(enumerate(row.tolist())) for row in costs]
        for position, pair in loose:
            self._link(self._costs[position], pair)

    def _link(self, cost: dict[int, float], pair: Pair) -> None:
        """Columns for all pairs of options, each taken as often as both of its options."""
        options = [[k for name, k in self._at if name == wanted] for wanted in (pair.first, pair.second)]
        table = pair.table.tolist()
        place = {
            (j, k): self.width + n for n, (j, k) in enumerate((j, k) for j in options[0] for k in options[1])
        }
        self.width += len(place)
        cost.update({column: table[j][k] for (j, k), column in place.items()})
        for side, name in enumerate((pair.first, pair.second)):
            for one in options[side]:
                row = {column: 1.0 for key, column in place.items() if key[side] == one}
                self._rows.append(({**row, self._at[name, one]: -1.0}, 0.0, 0.0))

    def limit(self, position: int, most: float) -> None:
        """Keep a cost at or below a value; in units of it, which the solver's tolerances are about."""
        row = self._costs[position]
        unit = max(abs(most), max((abs(value) for value in row.values()), default=0.0)) or 1.0
        scaled = {column: value / unit for column, value in row.items() if value}
        self._rows.append((scaled, -math.inf, most / unit + SLACK))

    def forbid(self, assignment: Mapping[str, int]) -> None:
        """Never this one again."""
        row = {}
        for start, each in zip(self.starts, self.groups, strict=False):
            row[start + each.choices.index(tuple(assignment[name] for name in each.names))] = 1.0
        self._rows.append((row, -math.inf, len(row) - 1.0))

    def solve(self) -> dict[str, int] | None:
        """The optimum of what is left; None where nothing is."""
        costs, kinds = np.zeros(self.width), np.zeros(self.width)
        costs[list(self._costs[0])] = list(self._costs[0].values())
        kinds[: self.binary] = 1
        result = milp(
            costs / (np.abs(costs).max(initial=0.0) or 1.0),
            integrality=kinds,
            bounds=Bounds(0, 1),
            constraints=self._constraints(),
            options={"mip_rel_gap": GAP if self.binary > SMALL else 0.0},
        )
        if result.x is None:
            if result.status == INFEASIBLE:
                return None
            raise RuntimeError(f"the solver gave up on a budget: {result.message}")
        found: dict[str, int] = {}
        for start, each in zip(self.starts, self.groups, strict=False):
            choice = each.choices[int(np.argmax(result.x[start : start + len(each.choices)]))]
            found.update(zip(each.names, choice, strict=True))
        return found

    def _constraints(self) -> LinearConstraint:
        ends = np.cumsum([0, *(len(row) for row, _, _ in self._rows)])
        data = [value for row, _, _ in self._rows for value in row.values()]
        at = [column for row, _, _ in self._rows for column in row]
        matrix = csr_matrix((data, at, ends), shape=(len(self._rows), self.width))
        low, high = (np.array([row[k] for row in self._rows]) for k in (1, 2))
        return LinearConstraint(matrix, low, high)

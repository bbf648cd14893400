"""What a user allows a network to cost, and that on a supernet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from dqss.budget import costs
from dqss.budget.cost import Cost, Probabilities, SumCost
from dqss.budget.latency import LatencyTable, latency
from dqss.budget.packing import EXPORTED, PACKED, exported
from dqss.budget.solve import Limit, minimize, smallest
from dqss.budget.workload import Workload
from dqss.errors import BudgetError
from dqss.supernet import Assignment, Supernet

FAR = 700.0
"""Of a score that is no number, or minus the logarithm of no probability: about that of the smallest."""


@dataclass(frozen=True)
class Budget:
    """Limits on what the exported network costs; all that are given hold at the same time, exactly.

    Attributes:
        size_mb: the whole network at rest, in millions of bytes, every weight at its own width.
        exported_size_mb: the same in the integer types that an exported file stores.
        average_weight_bits: mean width of the weights under search.
        average_activation_bits: mean width of the activations under search.
        bitops: multiply-accumulates times the bits of both factors, for one input.
        activation_memory_kb: the largest tensor that a layer reads, in thousands of bytes.
        latency_ms: all layers one after the other, by ...
        latency_table: ... a csv or YAML file with ``layer, weight_bits, activation_bits, ms``.
        exported_widths: bits of the integer types for weights in the exported file.
    """

    size_mb: float | None = None
    exported_size_mb: float | None = None
    average_weight_bits: float | None = None
    average_activation_bits: float | None = None
    bitops: float | None = None
    activation_memory_kb: float | None = None
    latency_ms: float | None = None
    latency_table: str | Path | None = None
    exported_widths: tuple[int, ...] = EXPORTED.widths

    def __post_init__(self) -> None:
        object.__setattr__(self, "exported_widths", tuple(self.exported_widths))
        for name, value in self.given().items():
            if not 0 < value < math.inf:
                raise BudgetError(f"budget.{name}={value}: expected a positive number, or null for no limit")
        if self.latency_ms is not None and self.latency_table is None:
            raise BudgetError("budget.latency_ms needs measurements: give budget.latency_table=FILE")

    def given(self) -> dict[str, float]:
        """The limits that are set."""
        names = [
            field.name for field in fields(self) if field.name not in ("latency_table", "exported_widths")
        ]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def on(self, supernet: Supernet, workload: Workload) -> Limits:
        """The same on a calibrated supernet.

        Raises:
            BudgetError: where no assignment keeps all limits, with the smallest value that can be kept.
        """
        makers: dict[str, Callable[[], Cost]] = {
            "size_mb": lambda: costs.size(supernet, PACKED, "size_mb"),
            "exported_size_mb": lambda: costs.size(
                supernet, exported(self.exported_widths), "exported_size_mb"
            ),
            "average_weight_bits": lambda: costs.average_weight_bits(supernet),
            "average_activation_bits": lambda: costs.average_activation_bits(supernet, workload),
            "bitops": lambda: costs.bitops(supernet, workload),
            "activation_memory_kb": lambda: costs.activation_memory(supernet, workload),
            "latency_ms": lambda: latency(supernet, LatencyTable.read(self.latency_table or "")),
        }
        given = self.given()
        found = [Limit(makers[name](), most) for name, most in given.items()]
        options = {name: len(decision.options) for name, decision in supernet.decisions.items()}
        others = (make for name, make in makers.items() if name not in given and name != "latency_ms")
        limits = Limits(options, found, [cost for make in others if (cost := _made(make)) is not None])
        limits.check()
        return limits


def _made(make: Callable[[], Cost]) -> Cost | None:
    """A cost that nobody asked for, if it can be counted."""
    try:
        return make()
    except (BudgetError, ValueError):
        return None


@dataclass(frozen=True)
class Limits:
    """Limits on the assignments of a supernet.

    Attributes:
        options: how many each decision has.
        limits: what has to hold.
        others: costs that are only told.
    """

    options: Mapping[str, int]
    limits: Sequence[Limit]
    others: Sequence[Cost] = ()

    def check(self) -> None:
        """Refuse limits that nothing keeps.

        Raises:
            BudgetError: with the smallest value that each can have, alone or beside the others.
        """
        for limit in self.limits:
            least = smallest(limit.cost, self.options)
            assert least is not None
            if least > limit.most:
                raise BudgetError(
                    f"{_said(limit)}: the search space allows no less than {_up(least)}{_unit(limit)}; "
                    "raise the limit, or add smaller candidates"
                )
        nothing = SumCost("nothing", "", {})
        if minimize(nothing, self.options, self.limits) is not None:
            return
        ways = []
        for limit in self.limits:
            least = smallest(limit.cost, self.options, [other for other in self.limits if other is not limit])
            if least is not None:
                ways.append(f"{_said(limit)} to {_up(least)}{_unit(limit)}")
        raise BudgetError(
            f"{' and '.join(map(_said, self.limits))} cannot be kept together: raise "
            f"{', or '.join(ways) or 'them'}, or add smaller candidates"
        )

    def hold(self, assignment: Assignment) -> bool:
        """Whether an assignment keeps them all, exactly."""
        return all(limit.holds(assignment) for limit in self.limits)

    def solve(self, scores: Mapping[str, Tensor]) -> dict[str, int]:
        """The assignment with the least sum of scores that keeps all limits.

        Args:
            scores: ``[K]`` a decision: how bad each option is.
        """
        single = {}
        for name, score in scores.items():
            values = torch.nan_to_num(score.detach().double().cpu(), nan=FAR, posinf=FAR, neginf=-FAR)
            single[name] = values - values.min()
        found = minimize(SumCost("score", "", single), self.options, self.limits)
        assert found is not None  # check() has found that something keeps them
        return found

    def near(self, assignment: Assignment, changes: int) -> Limits:
        """The same, and no more than so many decisions may differ from an assignment that keeps them."""
        differs = {}
        for name, count in self.options.items():
            differs[name] = torch.ones(count, dtype=torch.float64)
            differs[name][assignment[name]] = 0.0
        return replace(self, limits=[*self.limits, Limit(SumCost("changes", "", differs), changes)])

    def achieved(self, assignment: Assignment) -> dict[str, float]:
        """Every cost that is known, exactly."""
        known = [limit.cost for limit in self.limits] + list(self.others)
        return {cost.name: cost.of(assignment) for cost in known}

    def excess(self, probabilities: Probabilities) -> list[Tensor]:
        """Expected cost of each limit in units of it, less one: above zero where it is too much."""
        return [limit.cost.expected(probabilities) / limit.most - 1 for limit in self.limits]

    def prices(self, probabilities: Probabilities) -> list[dict[str, Tensor]]:
        """For each limit what each option adds to the expected cost, in units of the limit."""
        found = []
        for limit in self.limits:
            prices = limit.cost.prices(probabilities)
            found.append({name: price / limit.scale for name, price in prices.items()})
        return found


def _said(limit: Limit) -> str:
    return f"budget.{limit.cost.name}={limit.most:g}"


def _unit(limit: Limit) -> str:
    return f" {limit.cost.unit}" if limit.cost.unit else ""


def _up(value: float, digits: int = 4) -> str:
    """Rounded up, so that what is printed can be kept."""
    step = 10.0 ** (math.floor(math.log10(value)) + 1 - digits) if value > 0 else 1.0
    rounded = math.ceil(value / step) * step
    return f"{rounded if rounded >= value else rounded + step:.{digits + 1}g}"

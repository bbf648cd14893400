"""Strategies for several budgets from what one search has learned: the curve of cost and quality.

Each point is an integer program over the search's scores, compared with the refined strategy of the
next smaller budget, which a larger one allows as well, and refined from the better of both. Points
are folders of their own: one that is there is not computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dqss.budget.limits import Limits
from dqss.budget.steer import Steering
from dqss.discretize import RefineSettings, refine
from dqss.errors import StrategyError
from dqss.lit.checkpoint import LAST, AtomicCheckpoints
from dqss.measure import Evaluator
from dqss.report.run import CURVES
from dqss.strategy import STRATEGY_FILE, Strategy
from dqss.supernet import Assignment, Supernet

FOLDER = CURVES
"""Of the points, in the run folder of their search."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What was found for a budget.

    Attributes:
        assignment: within it.
        selection: its mean distance on the selection part.
        changes: what refinement did.
    """

    assignment: dict[str, int]
    selection: float
    changes: list[str]


def restore_scores(folder: Path, steering: Steering) -> None:
    """Take what a finished search has learned from its checkpoint into its supernet's decisions.

    Raises:
        StrategyError: where there is none, or that of another search.
    """
    try:
        checkpoint = AtomicCheckpoints().load_checkpoint(folder / LAST)
        with torch.no_grad():
            for decision in steering.decisions:
                decision.logits.copy_(checkpoint["state_dict"][f"logits.{decision.name}"])
        if "steering" in checkpoint:
            steering.load_state_dict(checkpoint["steering"])
    except Exception as error:
        raise StrategyError(f"{folder / LAST}: not the checkpoint of this search; search again") from error


def solve_point(
    evaluator: Evaluator,
    steering: Steering,
    limits: Limits,
    smaller: Sequence[Assignment],
    settings: RefineSettings,
) -> Found:
    """The best that is found within a budget.

    Args:
        evaluator: of the search.
        steering: with its scores.
        limits: of this point.
        smaller: refined strategies of other budgets; those that keep this one are begun from too.
        settings: of the refinement.
    """
    begins = [limits.solve(steering.scores()), *(dict(one) for one in smaller if limits.hold(one))]
    if steering.estimates is not None:
        begins.append(limits.solve(steering.estimates.effects))
    begin = min(begins, key=lambda one: evaluator.measure(one, "refine"))
    refined, changes = refine(evaluator, begin, settings, limits=limits)
    return Found(refined, evaluator.measure(refined, "select"), changes)


def assignment_of(strategy: Strategy, supernet: Supernet) -> dict[str, int]:
    """The options that a strategy has chosen among a supernet's.

    Raises:
        StrategyError: for a choice that is none of them.
    """
    quantizers = supernet.named_quantizers()
    found: dict[str, int] = {}
    for name, role, choice in strategy.choices():
        decision = quantizers[f"{name}.{role}"].decision if f"{name}.{role}" in quantizers else None
        candidate = choice.candidate()
        if decision is None or (candidate not in decision.options and decision.name not in found):
            raise StrategyError(f"{name}.{role}: {candidate.title!r} is no option of this search")
        found.setdefault(decision.name, decision.options.index(candidate))
    return found


def points_of(folder: Path, limit: str) -> dict[float, Strategy]:
    """The points of one kind of limit that a run folder has, by budget, smallest first."""
    found = {}
    for file in (folder / FOLDER).glob(f"{limit}_*/{STRATEGY_FILE}"):
        strategy = Strategy.load(file)
        limits: Any = (strategy.budget or {}).get("limits", {})
        if set(limits) == {limit}:
            found[float(limits[limit])] = strategy
    return dict(sorted(found.items()))


def point_folder(folder: Path, limit: str, most: float) -> Path:
    """Where the strategy of a point goes."""
    return folder / FOLDER / f"{limit}_{most:.10g}"


def table(points: Mapping[float, Strategy], limit: str) -> list[Row]:
    """A row a point: budget, cost, quality, and whether another point is both cheaper and better.

    Quality is the distance on the validation data, where there is any; otherwise on the selection
    part.
    """
    rows: list[Row] = []
    for most, strategy in points.items():
        budget: Any = strategy.budget
        searched: Any = strategy.metrics["searched"]
        rows.append({"budget": most, limit: budget["achieved"][limit]})
        for part in ("selection", "validation"):
            measured = searched.get(part) or {}
            rows[-1] |= {f"{key} ({part})": value for key, value in measured.items() if key != "count"}
    quality = (
        "distance (validation)" if all("distance (validation)" in r for r in rows) else "distance (selection)"
    )
    for row in rows:
        row["dominated"] = any(dominates(other, row, limit, quality) for other in rows)
    return rows


def dominates(one: Row, other: Row, cost: str, quality: str) -> bool:
    """Whether ``one`` is no worse in both, and better in one of them."""
    no_worse = one[cost] <= other[cost] and one[quality] <= other[quality]
    return bool(no_worse and (one[cost] < other[cost] or one[quality] < other[quality]))

"""Steps of the integer program: the best assignment within limits *and* near the one in place.

Around an assignment the distance is, to second order, a sum over decisions (:mod:`dqss.sensitivity`); the
integer program finds where that sum is least among all assignments that keep the limits and differ from
it in no more than so many decisions (local branching, Fischetti and Lodi 2003). A step is measured, and
taken if it is better. If not, what it promised too much is shared out among the options that it would have
changed, and the next step may change half as many, down to pairs: one up and one down, which a limit that
binds needs. It is over when nothing promises a gain any more.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

from dqss.budget.limits import Limits
from dqss.measure import Evaluator
from dqss.supernet import Assignment
from dqss.trials import gains, mean

WATCHED = 256
"""Inputs that estimates are made of."""
CONFIDENCE = 1.5
"""Standard errors that a step must gain: a dozen are tried, of which the luckiest gains as much by chance;
with half an error steps followed the images that they are measured on (``experiments/budgets``). Each is
measured on the whole part at once: of some thirty inputs a few decide the mean."""
HOPELESS = 1e6
"""What is added to the effects of a step after which the distance is no number."""
FEWEST = 2
"""Decisions that the smallest step may change."""


def descend(
    evaluator: Evaluator,
    assignment: Assignment,
    limits: Limits,
    passes: float,
    out_of_time: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, int], list[str]]:
    """Take steps until even the smallest gains nothing.

    Args:
        evaluator: of the network; measures on the ``refine`` part.
        assignment: keeps all limits, and so does every step.
        limits: to keep.
        passes: no step is begun after so many passes over the ``refine`` part.
        out_of_time: ends it too.

    Returns:
        The last assignment, and a line for each step.
    """
    current, changes = dict(assignment), list[str]()
    end = evaluator.meter.evaluations + passes * len(evaluator.parts["refine"])

    def over() -> bool:
        return evaluator.meter.evaluations >= end or out_of_time()

    if over():
        return current, changes
    best, radius, promising = evaluator.measure_each(current, "refine"), len(current), True
    while promising and not over():
        effects = evaluator.second_order(current, "refine", WATCHED).effects
        while promising and not over():
            trial = limits.near(current, radius).solve(effects)
            changed = [name for name, option in current.items() if trial[name] != option]
            promised = sum(float(effects[name][trial[name]]) for name in changed)
            if not promised < 0:
                promising = False
                break
            each = evaluator.measure_each(trial, "refine")
            if gains(best, each, CONFIDENCE):
                changes.append(f"{len(changed)} decisions at once, {mean(best):.5f} -> {mean(each):.5f}")
                current, best = trial, each
                break
            lost = mean(each) - mean(best)
            too_much = (max(lost, 0.0) - promised if isfinite(lost) else HOPELESS) / len(changed)
            for name in changed:
                effects[name][trial[name]] += too_much
            radius = max(FEWEST, min(radius, len(changed)) // 2)
    return current, changes

"""Whether a change is better, by measurement and by more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, isnan
from statistics import stdev

from dqss.measure import Evaluator
from dqss.supernet import Assignment


def better(
    evaluator: Evaluator, trial: Assignment, best: list[float], screen: int, confidence: float
) -> list[float] | None:
    """Distances of ``trial`` on the ``refine`` part if it is better than ``best``, otherwise None.

    Args:
        evaluator: of the network.
        trial: an assignment.
        best: distances on the ``refine`` part of what is there.
        screen: inputs on which it is tried first; only if it is better there it gets the whole part.
        confidence: standard errors of the gains (paired, over the inputs) that the mean must exceed.
    """
    if screen < len(best):
        few = evaluator.measure_each(trial, "refine", screen)
        if not mean(few) < finite(mean(best[:screen])):  # nor if it is NaN
            return None
    each = evaluator.measure_each(trial, "refine")
    return each if gains(best, each, confidence) else None


def gains(before: Sequence[float], after: Sequence[float], confidence: float) -> bool:
    """Whether the mean falls by more than so many standard errors of the differences (paired)."""
    if not isfinite(mean(after)):
        return False
    if not isfinite(mean(before)):
        return True
    differences = [b - a for b, a in zip(before, after, strict=True)]
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return mean(differences) > confidence * error


def finite(distance: float) -> float:
    """NaN compares with nothing: a network that gives it is the worst of all."""
    return inf if isnan(distance) else distance


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)

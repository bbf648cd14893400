"""From logits to one choice a decision: argmax, refinement, and the never-worse rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, isnan
from statistics import stdev

from dqss.budget.limits import Limits
from dqss.budget.switches import Switch, within
from dqss.errors import UserError
from dqss.measure import Evaluator
from dqss.supernet import Assignment
from dqss.uniform import FIRST_RUNG, Screening, screen

PASSES = 10.0
"""Of a refinement for which nothing else is said."""


@dataclass(frozen=True)
class RefineSettings:
    """How much the argmax is re-decided by measurement.

    Attributes:
        passes: limit, in passes over the part that is searched on (0: no refinement); None: ten, or
            what the search that it belongs to says.
        screen: images on which a change is tried first; only promising ones get the whole part.
        alternatives: options tried per decision in one sweep.
        confidence: a change is kept if its mean gain exceeds so many standard errors of the
            gains (paired, over the images). Hundreds of changes are tried: of those that do nothing,
            one in six gains more than one standard error by chance, one in forty more than two, one
            in seven hundred more than three.
    """

    passes: float | None = None
    screen: int = 32
    alternatives: int = 2
    confidence: float = 3.0

    def __post_init__(self) -> None:
        for name, least in (("passes", 0), ("screen", 1), ("alternatives", 1), ("confidence", 0)):
            if getattr(self, name) is not None and not getattr(self, name) >= least:
                raise UserError(f"refine.{name}={getattr(self, name)}: expected {least} or more")

    def limit(self, images: int) -> float:
        """Images of a refinement on a part with so many."""
        return (PASSES if self.passes is None else self.passes) * images


@dataclass(frozen=True)
class Discretized:
    """The contenders and the winner.

    Attributes:
        assignments: by name: ``argmax``, ``refined``, and the uniform finalists.
        selection: mean distance on the selection part of ``argmax``, ``refined`` and the best
            uniform one.
        exported: ``refined``, or the best uniform strategy if that is better on the selection part.
        best_uniform: name of the uniform strategy that is best on the part that is searched on;
            None where no uniform strategy exists.
    """

    assignments: dict[str, Assignment]
    selection: dict[str, float]
    exported: str
    best_uniform: str | None
    changes: list[str] = field(default_factory=list)


def discretize(
    evaluator: Evaluator,
    found: Sequence[Assignment],
    uniform: dict[str, Assignment],
    settings: RefineSettings,
    finalists: int,
    first: int = FIRST_RUNG,
    out_of_time: Callable[[], bool] = lambda: False,
    limits: Limits | None = None,
    screened: Screening | None = None,
) -> Discretized:
    """Choose, refine, and compare on the selection part, which nothing has touched before.

    Of the assignments that the search has ``found`` the one is taken that is best on the part that
    is searched on, or the last one if there is no time to measure. The exported assignment is never
    worse on the selection part than the best uniform one. That one is chosen on the part that is
    searched on, like the searched one: of several measured on the selection part the luckiest would
    win, and its luck would be counted for it. With ``limits``, which ``found`` and ``uniform`` keep
    already, refinement stays within them. ``screened`` is what :func:`dqss.uniform.screen` has found of
    ``uniform``, if it has looked already.
    """
    argmax = _best(evaluator, found, out_of_time)
    refined, changes = refine(evaluator, argmax, settings, out_of_time, limits)
    if screened is None and uniform:
        screened = screen(evaluator, uniform, finalists, first)
    names = screened.names if screened is not None else []
    best_uniform = names[0] if names else None
    contenders: dict[str, Assignment] = {"refined": refined, "argmax": argmax}
    contenders.update({name: uniform[name] for name in names})
    measured = ("refined", "argmax", *names[:1])
    selection = {name: evaluator.measure(contenders[name], "select") for name in measured}
    # Between argmax and refined the larger part has spoken already, and by more than chance.
    exported = min(("refined", *names[:1]), key=lambda name: _finite(selection[name]))
    return Discretized(contenders, selection, exported, best_uniform, changes)


def _best(
    evaluator: Evaluator, found: Sequence[Assignment], out_of_time: Callable[[], bool]
) -> dict[str, int]:
    different = [one for k, one in enumerate(found) if one not in found[k + 1 :]]
    if len(different) == 1 or out_of_time():
        return dict(found[-1])
    scores = [_finite(evaluator.measure(one, "refine")) for one in different]
    return dict(different[scores.index(min(scores))])


def refine(
    evaluator: Evaluator,
    assignment: Assignment,
    settings: RefineSettings,
    out_of_time: Callable[[], bool] = lambda: False,
    limits: Limits | None = None,
) -> tuple[dict[str, int], list[str]]:
    """Re-decide layers by their measured effect on the ``refine`` part, most promising first.

    One forward and backward pass estimates what every switch of every decision would do
    (:meth:`Evaluator.first_order`); the best ones are tried in that order and kept where the
    measured distance falls by more than chance. Sweeps repeat until none helps or the limit is
    reached. With ``limits`` a switch that would break one is tried together with another that makes
    room for it.

    Returns:
        The refined assignment and a line for each change.
    """
    current, changes = dict(assignment), list[str]()
    limit = settings.limit(len(evaluator.parts["refine"]))
    if limit <= 0 or out_of_time():
        return current, changes
    begin = evaluator.meter.evaluations
    best = evaluator.measure_each(current, "refine")
    improved = True
    while improved:
        improved = False
        for move in _proposals(evaluator, current, settings.alternatives, limits):
            if evaluator.meter.evaluations - begin >= limit or out_of_time():
                return current, changes
            trial = {**current, **move}
            if limits is not None and not limits.hold(trial):
                continue  # an earlier change of this sweep has used the room
            each = _try(evaluator, trial, best, settings)
            if each is not None:
                what = " and ".join(f"{name}: option {current[name]} -> {k}" for name, k in move.items())
                changes.append(f"{what}, {_mean(best):.5f} -> {_mean(each):.5f}")
                current, best, improved = trial, each, True
    return current, changes


def _try(
    evaluator: Evaluator, trial: Assignment, best: list[float], settings: RefineSettings
) -> list[float] | None:
    """Distances of ``trial`` on the ``refine`` part if it is better than ``best``, otherwise None."""
    if settings.screen < len(best):
        few = evaluator.measure_each(trial, "refine", settings.screen)
        if not _mean(few) < _finite(_mean(best[: settings.screen])):  # nor if it is NaN
            return None
    each = evaluator.measure_each(trial, "refine")
    if not isfinite(_mean(each)):
        return None
    if not isfinite(_mean(best)):
        return each
    gains = [before - after for before, after in zip(best, each, strict=True)]
    error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    return each if _mean(gains) > settings.confidence * error else None


def _proposals(
    evaluator: Evaluator, current: Assignment, alternatives: int, limits: Limits | None
) -> list[dict[str, int]]:
    """The most promising switches of each decision, by first-order effect, best first."""
    effects = evaluator.first_order(current, "refine")
    ranked: list[Switch] = []
    every: list[Switch] = []
    for name, effect in effects.items():
        outcome = evaluator.supernet.decisions[name].outcome.tolist()
        # The first of each outcome, but for the one that is in place.
        first = [outcome.index(number) for number in set(outcome) - {outcome[current[name]]}]
        order = sorted(first, key=effect.tolist().__getitem__)
        switches = [Switch(float(effect[index]), name, index) for index in order]
        ranked += switches[:alternatives]
        every += switches
    ranked.sort(key=lambda switch: (switch.effect, switch.name, switch.option))
    if limits is None:
        return [{switch.name: switch.option} for switch in ranked]
    moves = within(ranked, every, current, limits)
    return [move for _, move in sorted(moves, key=lambda move: move[0])]


def _finite(distance: float) -> float:
    """NaN compares with nothing: a network that gives it is the worst of all."""
    return inf if isnan(distance) else distance


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

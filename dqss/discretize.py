"""From logits to one choice a decision: argmax, refinement, and the never-worse rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from dqss.budget.limits import Limits
from dqss.budget.switches import Switch, within
from dqss.checks import check_least
from dqss.descent import CONFIDENCE, descend
from dqss.measure import Evaluator
from dqss.supernet import Assignment
from dqss.trials import better, finite, gains, mean
from dqss.uniform import FIRST_RUNG, Screening, screen

PASSES = 10.0
"""Of a refinement for which nothing else is said."""


@dataclass(frozen=True)
class RefineSettings:
    """How much the argmax is re-decided by measurement.

    Attributes:
        passes: limit, in passes over the part that is searched on (0: no refinement); None: ten, or
            what the search that it belongs to says.
        rescue_passes: the limit where the argmax is no better than the best uniform strategy, from which
            refinement begins then; None: as many as ``passes``.
        screen: images on which a change is tried first; only promising ones get the whole part.
        alternatives: options tried per decision in one sweep.
        program_passes: with a budget, limit for the steps of the integer program before the sweeps
            (:func:`dqss.descent.descend`), in passes likewise (0: none).
        confidence: a change is kept if its mean gain exceeds so many standard errors of the
            gains (paired, over the images). Hundreds of changes are tried: of those that do nothing,
            one in six gains more than one standard error by chance, one in forty more than two, one
            in seven hundred more than three.
    """

    passes: float | None = None
    rescue_passes: float | None = None
    screen: int = 32
    alternatives: int = 2
    confidence: float = 3.0
    program_passes: float = 25.0

    def __post_init__(self) -> None:
        check_least(self, "refine", 0, "passes", "rescue_passes", optional=True)
        check_least(self, "refine", 0, "confidence", "program_passes")
        check_least(self, "refine", 1, "screen", "alternatives")

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
        exported: ``refined``, or the best uniform strategy if that is better in the mean of both parts.
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
    begun: Sequence[Assignment] = (),
) -> Discretized:
    """Choose, refine, and compare, also on the selection part, which nothing has touched before.

    Of the assignments that the search has ``found`` the one is taken that is best on the part that
    is searched on, or the last one if there is no time to measure. It has to be better by more than chance
    than those that the search has ``begun`` from, the surest of which come first. In the mean of that part
    and the selection part, each counting half, the exported assignment is never worse than the best uniform
    one: a handful of some hundred inputs decide their mean, and by itself the selection part is often wrong
    about two that are close (``experiments/budgets``). The best uniform one is chosen on the part that is
    searched on, like the searched one: of several measured on the selection part the luckiest would win,
    and its luck would be counted for it. Where it is no worse than the argmax, refinement begins from it.
    With ``limits``, which ``found`` and ``uniform`` keep already, refinement stays within them.
    ``screened`` is what :func:`dqss.uniform.screen` has found of ``uniform``, if it has looked already.
    """
    if screened is None and uniform:
        screened = screen(evaluator, uniform, finalists, first)
    names = screened.names if screened is not None else []
    best_uniform = names[0] if names else None
    argmax = _best(evaluator, found, out_of_time)
    if begun and not out_of_time():
        argmax = _surest(evaluator, [*begun, argmax])
    begin = argmax
    if limits is not None or settings.limit(1) > 0 or settings.rescue_passes:
        begin = _best(evaluator, [*(uniform[name] for name in names[:1]), argmax], out_of_time)
    if begin != argmax and settings.rescue_passes is not None:
        settings = replace(settings, passes=settings.rescue_passes)
    refined, changes = refine(evaluator, begin, settings, out_of_time, limits)
    contenders: dict[str, Assignment] = {"refined": refined, "argmax": argmax}
    contenders.update({name: uniform[name] for name in names})
    measured = ("refined", "argmax", *names[:1])
    selection = {name: evaluator.measure(contenders[name], "select") for name in measured}
    # Between argmax and refined the larger part has spoken already, and by more than chance.
    both = {name: selection[name] for name in ("refined", *names[:1])}
    if len(both) > 1:
        both = {
            name: (found + evaluator.measure(contenders[name], "refine")) / 2 for name, found in both.items()
        }
    exported = min(both, key=lambda name: finite(both[name]))
    if begin != argmax and refined == begin:
        exported = names[0]  # by its own name: nothing that was found is in it
    return Discretized(contenders, selection, exported, best_uniform, changes)


def _best(
    evaluator: Evaluator, found: Sequence[Assignment], out_of_time: Callable[[], bool]
) -> dict[str, int]:
    different = [one for k, one in enumerate(found) if one not in found[k + 1 :]]
    if len(different) == 1 or out_of_time():
        return dict(found[-1])
    scores = [finite(evaluator.measure(one, "refine")) for one in different]
    return dict(different[scores.index(min(scores))])


def _surest(evaluator: Evaluator, found: Sequence[Assignment]) -> dict[str, int]:
    """The first, unless a later one gains as much as a step of the program has to.

    All of them were made for the inputs that they are measured on, some by more of what is chance in these.
    """
    chosen, best = found[0], evaluator.measure_each(found[0], "refine")
    for one in found[1:]:
        each = best if one == chosen else evaluator.measure_each(one, "refine")
        if gains(best, each, CONFIDENCE):
            chosen, best = one, each
    return dict(chosen)


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
    reached. With ``limits`` steps of the integer program come first (:func:`dqss.descent.descend`),
    effects are estimated to second order, since first order would take the narrowest option there is,
    and a switch that would break a limit is tried together with another that makes room for it.

    Returns:
        The refined assignment and a line for each change.
    """
    current, changes = dict(assignment), list[str]()
    limit = settings.limit(len(evaluator.parts["refine"]))
    if limit <= 0 or out_of_time():
        return current, changes
    if limits is not None:
        current, changes = descend(evaluator, current, limits, settings.program_passes, out_of_time)
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
            each = better(evaluator, trial, best, settings.screen, settings.confidence)
            if each is not None:
                what = " and ".join(f"{name}: option {current[name]} -> {k}" for name, k in move.items())
                changes.append(f"{what}, {mean(best):.5f} -> {mean(each):.5f}")
                current, best, improved = trial, each, True
    return current, changes


def _proposals(
    evaluator: Evaluator, current: Assignment, alternatives: int, limits: Limits | None
) -> list[dict[str, int]]:
    """The most promising switches of each decision, by their estimated effect, best first."""
    if limits is None:
        effects = evaluator.first_order(current, "refine")
    else:
        effects = evaluator.second_order(current, "refine").effects
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

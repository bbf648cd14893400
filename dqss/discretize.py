"""From logits to one choice a decision: argmax, refinement, and the never-worse rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dqss.measure import Evaluator
from dqss.supernet import Assignment
from dqss.uniform import screen


@dataclass(frozen=True)
class RefineSettings:
    """How much the argmax is re-decided by measurement.

    Attributes:
        passes: limit, in passes over the refine part (0: no refinement).
        screen: images on which a change is tried first; only promising ones get the whole part.
        alternatives: options tried per decision in one sweep.
    """

    passes: float = 60.0
    screen: int = 32
    alternatives: int = 2


@dataclass(frozen=True)
class Discretized:
    """The contenders and the winner.

    Attributes:
        assignments: by name: ``argmax``, ``refined``, and the uniform finalists.
        selection: mean distance of each on the selection part.
        exported: name of the best; ties go to the searched ones.
        best_uniform: name of the best uniform finalist, None where no uniform strategy exists.
    """

    assignments: dict[str, Assignment]
    selection: dict[str, float]
    exported: str
    best_uniform: str | None
    changes: list[str] = field(default_factory=list)


def discretize(
    evaluator: Evaluator,
    uniform: dict[str, Assignment],
    settings: RefineSettings,
    finalists: int,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Discretized:
    """Choose, refine, and compare on the selection part, which nothing has touched before.

    The exported assignment is never worse there than the best uniform one.
    """
    argmax = evaluator.supernet.argmax()
    refined, changes = refine(evaluator, argmax, settings, out_of_time)
    names = screen(evaluator, uniform, finalists) if uniform else []
    contenders: dict[str, Assignment] = {"refined": refined, "argmax": argmax}
    contenders.update({name: uniform[name] for name in names})
    selection = {name: evaluator.measure(found, "select") for name, found in contenders.items()}
    exported = min(selection, key=lambda name: selection[name])
    best_uniform = min(names, key=lambda name: selection[name]) if names else None
    return Discretized(contenders, selection, exported, best_uniform, changes)


def refine(
    evaluator: Evaluator,
    assignment: Assignment,
    settings: RefineSettings,
    out_of_time: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, int], list[str]]:
    """Re-decide layers by their measured effect on the refine part, most promising first.

    One forward and backward pass estimates what every switch of every decision would do
    (:meth:`Evaluator.first_order`); the best ones are tried in that order and kept where the
    measured distance falls. Sweeps repeat until none helps or the limit is reached.

    Returns:
        The refined assignment and a line for each change.
    """
    current = dict(assignment)
    limit = settings.passes * len(evaluator.parts["refine"])
    spent, changes = 0, []
    best = None
    tried: set[tuple[str, int]] = set()
    while spent < limit and not out_of_time():
        if best is None:
            best = evaluator.measure(current, "refine")
        improved = False
        for name, option in _proposals(evaluator, current, settings.alternatives):
            if spent >= limit or out_of_time():
                break
            if (name, option) in tried or option == current[name]:
                continue
            tried.add((name, option))
            trial = {**current, name: option}
            score, cost = _try(evaluator, current, trial, settings.screen, best)
            spent += cost
            if score < best:
                changes.append(f"{name}: option {current[name]} -> {option}, {best:.5f} -> {score:.5f}")
                current, best, improved = trial, score, True
                tried = {(name, option)}
        if not improved:
            break
    return current, changes


def _try(
    evaluator: Evaluator, current: Assignment, trial: Assignment, screen_images: int, best: float
) -> tuple[float, int]:
    """Distance of ``trial`` (infinite if a few images already speak against it), and its cost."""
    part = len(evaluator.parts["refine"])
    if screen_images < part:
        before = evaluator.measure(current, "refine", screen_images)
        if evaluator.measure(trial, "refine", screen_images) >= before:
            return float("inf"), screen_images
    return evaluator.measure(trial, "refine"), part + min(screen_images, part)


def _proposals(evaluator: Evaluator, current: Assignment, alternatives: int) -> list[tuple[str, int]]:
    effects = evaluator.first_order(current, "refine")
    ranked: list[tuple[float, str, int]] = []
    for name, effect in effects.items():
        order = [index for index in effect.argsort().tolist() if index != current[name]]
        ranked += [(float(effect[index]), name, index) for index in order[:alternatives]]
    return [(name, index) for _, name, index in sorted(ranked)]

"""Uniform strategies: one weight and one activation algorithm for every layer (and product).

They are what people use today, so they are what a searched strategy is compared with; where the best of
them is better on the selection part, by more than chance, it is exported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan
from operator import ge
from typing import cast

import torch
from torch import Tensor

from dqss.budget.limits import Limits
from dqss.measure import Evaluator
from dqss.mixed import MixedActivation, MixedWeight
from dqss.spec import Candidate
from dqss.supernet import Assignment, Supernet

FIRST_RUNG, RUNG_FACTOR = 16, 4
"""Images on which all uniform strategies are measured, and how many times more the better ones get."""


def uniform_assignments(supernet: Supernet) -> dict[str, Assignment]:
    """Every pair (weight candidate, activation candidate) as an assignment of all decisions.

    A decision without that very candidate (say, a first layer kept at 8 bits) takes the same
    algorithm at the nearest bits; pairs that some decision cannot follow at all are left out,
    and so are pairs that come to the same assignment as an earlier one.
    """
    weights = _distinct(
        [layer.weight.decision.options for layer in supernet.layers.values() if layer.weight is not None]
    )
    activations = _distinct(
        [
            quantizer.decision.options
            for quantizer in supernet.quantizers()
            if isinstance(quantizer, MixedActivation)
        ]
    )
    found: dict[str, Assignment] = {}
    for weight in weights or [None]:
        for activation in activations or [None]:
            assignment = _follow(supernet, weight, activation)
            if assignment is not None and assignment not in found.values():
                found[pair_name(weight, activation)] = assignment
    return found


def affordable(
    supernet: Supernet, uniform: dict[str, Assignment], limits: Limits | None
) -> dict[str, Assignment]:
    """The uniform strategies within a budget, without those that it would allow more bits.

    Without limits, all.
    """
    if limits is None:
        return uniform
    kept = {name: found for name, found in uniform.items() if limits.hold(found)}
    decisions = supernet.decisions
    alike: dict[tuple[object, ...], list[tuple[str, list[int]]]] = {}
    for name, found in kept.items():
        options = [cast("Candidate", decisions[decision].options[k]) for decision, k in found.items()]
        key = tuple((option.method, option.spec.scheme) for option in options)
        alike.setdefault(key, []).append((name, [option.spec.bits for option in options]))
    for group in alike.values():
        for name, bits in group:
            if any(more != bits and all(map(ge, more, bits)) for _, more in group):
                del kept[name]
    return kept


def widest(supernet: Supernet) -> dict[str, int]:
    """The first option with the most bits of each decision: of all that is known, the next to float."""
    found = {}
    for name, decision in supernet.decisions.items():
        bits = [cast("Candidate", option).spec.bits for option in decision.options]
        found[name] = bits.index(max(bits))
    return found


def pair_name(weight: Candidate | None, activation: Candidate | None) -> str:
    """``W mse@4 / A percentile(p=99.9)@4``."""
    parts = [f"{role} {c.title}" for role, c in (("W", weight), ("A", activation)) if c is not None]
    return " / ".join(parts)


@dataclass(frozen=True)
class Screening:
    """What screening has found.

    Attributes:
        names: of the finalists, best first.
        scores: mean distance of every strategy on the first few images, by name.
    """

    names: list[str]
    scores: dict[str, float]


def screen(
    evaluator: Evaluator, uniform: dict[str, Assignment], finalists: int, first: int = FIRST_RUNG
) -> Screening:
    """The ``finalists`` best, by successive halving on the ``refine`` part.

    All are measured on the ``first`` images, the better quarter on four times as many, and so on; the
    last few on all images. With 16 that is a tenth of the cost of measuring all on everything.
    """
    alive, count, shown = list(uniform), first, dict[str, float]()
    # One that is left over needs no further look: there is nothing to compare it with.
    while len(alive) > 1 or not shown:
        last = len(alive) <= finalists or count >= len(evaluator.parts["refine"])
        images = None if last else count
        scores = {name: evaluator.measure(uniform[name], "refine", images) for name in alive}
        shown = shown or scores
        alive.sort(key=lambda name: inf if isnan(scores[name]) else scores[name])
        if last:
            break
        alive = alive[: max(finalists, len(alive) // RUNG_FACTOR)]
        count *= RUNG_FACTOR
    return Screening(alive[:finalists], shown)


def shown_effects(
    supernet: Supernet, uniform: Mapping[str, Assignment], scores: Mapping[str, float]
) -> dict[str, Tensor]:
    """What uniform strategies say of each decision's options, before anything else is known.

    An option is as good as the best strategy with it; what that strategy is worse by than the best
    of all, its decisions share: those of weights, or those of activations. Only differences count.

    Args:
        supernet: whose decisions.
        uniform: strategies, by name.
        scores: mean distance of each; infinite or NaN count as the worst of the others.

    Returns:
        The effect on the distance, ``[K]`` fp64, by decision; NaN for options that no strategy has.
    """
    finite = [score for score in scores.values() if isfinite(score)]
    if not finite:
        return {}
    best, worst = min(finite), max(finite)
    roles = {q.decision.name: isinstance(q, MixedWeight) for q in supernet.quantizers()}
    sharing = Counter(roles.values())
    found: dict[str, Tensor] = {}
    for name, decision in supernet.decisions.items():
        effect = torch.full((len(decision.options),), inf, dtype=torch.float64)
        for strategy, score in scores.items():
            option = uniform[strategy][name]
            effect[option] = min(float(effect[option]), score if isfinite(score) else worst)
        found[name] = torch.where(effect < inf, (effect - best) / sharing[roles[name]], torch.nan)
    return found


def _distinct(options: Sequence[Sequence[object]]) -> list[Candidate | None]:
    """The different candidates of all decisions, those that most decisions have first."""
    seen: dict[tuple[object, ...], Candidate | None] = {}
    count: Counter[tuple[object, ...]] = Counter()
    for choices in options:
        for candidate in choices:
            assert isinstance(candidate, Candidate)
            seen.setdefault(candidate.kind, candidate)
            count[candidate.kind] += 1
    return [seen[kind] for kind in sorted(seen, key=lambda kind: -count[kind])]


def _follow(supernet: Supernet, weight: Candidate | None, activation: Candidate | None) -> Assignment | None:
    assignment: dict[str, int] = {}
    for quantizer in supernet.quantizers():
        wanted = weight if isinstance(quantizer, MixedWeight) else activation
        if wanted is None:
            continue
        index = _nearest(wanted, quantizer.decision.options)
        if index is None:
            return None
        assignment[quantizer.decision.name] = index
    return assignment


def _nearest(wanted: Candidate, options: Sequence[object]) -> int | None:
    best: tuple[tuple[bool, int], int] | None = None
    for index, option in enumerate(options):
        assert isinstance(option, Candidate)
        if option.method == wanted.method:
            rank = (option.kind[1:] != wanted.kind[1:], abs(option.spec.bits - wanted.spec.bits))
            if best is None or rank < best[0]:
                best = (rank, index)
    return None if best is None else best[1]

"""Strategies that are tuned: where each comes from, and among which candidates it is searched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

from dqss.search_spaces.studies import eight
from dqss.space import Rule, SearchSpace
from dqss.spec import Candidate

WIDTHS = (3, 4, 5, 6, 8)
WIDE = 8
"""Bits of weights that lose next to nothing."""


class Source(Enum):
    """Where a strategy comes from; a uniform one has one algorithm for weights and activations.

    But for ``adaround``, which is for weights: activations are ``mse`` then.
    """

    SEARCH = "search"
    BEST_UNIFORM = "best_uniform"
    MINMAX = "minmax"
    MSE = "mse"
    ADAROUND = "adaround"

    @property
    def pair(self) -> tuple[str, str]:
        """The algorithms of weights and of activations of a uniform strategy."""
        return self.value, "mse" if self is Source.ADAROUND else self.value


class Weights(Enum):
    """The candidates of a weight in a search: eight, these and ``adaround``, or that alone.

    Or eight of eight bits, which only activations are searched around: weights are then ``mse``. Or
    ``adaround`` on grids with a zero point and without, while activations are ``mse``. Or ``adaround`` with
    three to eight bits, and ``mse`` activations likewise where they have fewer than eight, of which the means
    over all values may not exceed those of the uniform strategies; or such weights, and all eight of
    activations at the bits that they have.
    """

    EIGHT = "eight"
    NINE = "nine"
    FITTED = "fitted"
    WIDE = "wide"
    GRIDS = "grids"
    WIDTHS = "widths"
    EVERYTHING = "everything"


@dataclass(frozen=True)
class Start:
    """A strategy that is tuned.

    Attributes:
        source: see there.
        weights: see there; for a search.
        equalized: whether the weights of layers that follow one another are equalized first.
        affine: whether grids of weights have a zero point, as in BRECQ's and QDrop's own studies.
    """

    source: Source
    weights: Weights = Weights.EIGHT
    equalized: bool = False
    affine: bool = False


STARTS = {
    "best_uniform": Start(Source.BEST_UNIFORM),
    "minmax": Start(Source.MINMAX),
    "mse": Start(Source.MSE),
    "adaround": Start(Source.ADAROUND, Weights.NINE),
    "searched": Start(Source.SEARCH),
    "fitted": Start(Source.SEARCH, Weights.NINE),
    "activations": Start(Source.SEARCH, Weights.FITTED),
    "around_wide": Start(Source.SEARCH, Weights.WIDE),
    "grids": Start(Source.SEARCH, Weights.GRIDS),
    "widths": Start(Source.SEARCH, Weights.WIDTHS),
    "everything": Start(Source.SEARCH, Weights.EVERYTHING),
}
STARTS |= {
    **{f"equalized_{name}": replace(start, equalized=True) for name, start in STARTS.items()},
    **{
        f"affine_{name}": replace(start, affine=True)
        for name, start in STARTS.items()
        if start.weights is not Weights.GRIDS  # has both kinds of grids
    },
}


def space(
    bits: tuple[int, int], edges: tuple[str, ...], weights: Weights = Weights.EIGHT, affine: bool = False
) -> SearchSpace:
    """Eight candidates for inputs, some for weights; first and last layer like the others, or at 8 bits."""
    found = eight(*bits) if weights is not Weights.WIDE else eight(WIDE, bits[1])
    if edges:
        (rule,) = eight(8, 8).rules
        name = f"{found.name}, edges at 8"
        found = replace(found, name=name, rules=(replace(rule, names=edges), *found.rules))
    if affine:
        found = _with_rules(found, "affine weights", lambda rule: replace(rule, weight=_affine(rule.weight)))
    if weights in (Weights.EIGHT, Weights.WIDE):
        return found
    return _with_rules(found, f"weights {weights.value}", partial(_fitted, weights))


def _with_rules(found: SearchSpace, name: str, change: Callable[[Rule], Rule]) -> SearchSpace:
    return replace(found, name=f"{found.name}, {name}", rules=tuple(map(change, found.rules)))


def _affine(candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    return tuple(replace(one, spec=replace(one.spec, symmetric=False)) for one in candidates)


def _fitted(weights: Weights, rule: Rule) -> Rule:
    fitted = (Candidate.of("adaround", rule.weight[0].spec),)
    if weights is Weights.EVERYTHING:
        return replace(rule, weight=_widths(fitted))
    if weights in (Weights.GRIDS, Weights.WIDTHS):
        inputs = tuple(one for one in rule.activation if one.method == Source.MSE.value)
        if weights is Weights.WIDTHS:
            return replace(rule, weight=_widths(fitted), activation=_widths(inputs))
        return replace(rule, weight=fitted + _affine(fitted), activation=inputs)
    return replace(rule, weight=(rule.weight if weights is Weights.NINE else ()) + fitted)


def _widths(candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """At several bits, where that can gain: eight of an input lose next to nothing."""
    if candidates[0].spec.bits == WIDE:
        return candidates
    return tuple(replace(one, spec=replace(one.spec, bits=bits)) for one in candidates for bits in WIDTHS)

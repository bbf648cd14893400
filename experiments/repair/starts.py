"""Strategies that are tuned: where each comes from, and among which candidates it is searched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

from torch import nn

from dqss.search_spaces.studies import eight
from dqss.space import Rule, SearchSpace
from dqss.spec import Candidate

WIDTHS = (3, 4, 5, 6, 8)
WIDE = 8
"""Bits of weights that lose next to nothing."""


class Source(Enum):
    """Where a strategy comes from; a uniform one has one algorithm for weights and activations."""

    SEARCH = "search"
    BEST_UNIFORM = "best_uniform"
    MINMAX = "minmax"
    MSE = "mse"


class Weights(Enum):
    """The candidates of a weight in a search: eight, these and ``adaround``, or that alone.

    Or eight of eight bits, which only activations are searched around: weights are then ``mse``. Or
    ``adaround`` on grids with a zero point and without, while activations are ``mse``. Or ``adaround`` with
    three to eight bits, of which the mean over all weights may not exceed that of the uniform strategies.
    """

    EIGHT = "eight"
    NINE = "nine"
    FITTED = "fitted"
    WIDE = "wide"
    GRIDS = "grids"
    WIDTHS = "widths"


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
    "searched": Start(Source.SEARCH),
    "fitted": Start(Source.SEARCH, Weights.NINE),
    "activations": Start(Source.SEARCH, Weights.FITTED),
    "around_wide": Start(Source.SEARCH, Weights.WIDE),
    "grids": Start(Source.SEARCH, Weights.GRIDS),
    "widths": Start(Source.SEARCH, Weights.WIDTHS),
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
    if weights in (Weights.GRIDS, Weights.WIDTHS):
        inputs = tuple(one for one in rule.activation if one.method == Source.MSE.value)
        several = fitted + _affine(fitted) if weights is Weights.GRIDS else _widths(fitted, bool(rule.names))
        return replace(rule, weight=several, activation=inputs)
    return replace(rule, weight=(rule.weight if weights is Weights.NINE else ()) + fitted)


def _widths(candidates: tuple[Candidate, ...], edges: bool) -> tuple[Candidate, ...]:
    """At several bits, but for those of the first and the last layer."""
    widths = (candidates[0].spec.bits,) if edges else WIDTHS
    return tuple(replace(one, spec=replace(one.spec, bits=bits)) for one in candidates for bits in widths)


def mean_bits(model: nn.Module, bits: int, edges: tuple[str, ...]) -> float:
    """Of all weights, where those of the first and the last layer have eight."""
    layers = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    return sum(size * (8 if name in edges else bits) for name, size in layers.items()) / sum(layers.values())

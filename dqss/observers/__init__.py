"""Static algorithms, one file each. A new one is a file beside these and one line below."""

from __future__ import annotations

import dataclasses

from dqss.errors import SearchSpaceError, near_match
from dqss.observers.aciq import ACIQGaussian, ACIQLaplace
from dqss.observers.adaround import AdaRound
from dqss.observers.base import Algorithm, BatchExtremes, Statistics
from dqss.observers.entropy import Entropy
from dqss.observers.hessian import Hessian
from dqss.observers.histogram import HistogramAccumulator
from dqss.observers.lp import Lp
from dqss.observers.minmax import MinMax
from dqss.observers.moving_average import MovingAverage
from dqss.observers.mse import MSE
from dqss.observers.percentile import Percentile
from dqss.observers.power_of_two import PowerOfTwo
from dqss.observers.together import Problem, solve_together
from dqss.spec import Candidate

ALGORITHMS: dict[str, type[Algorithm]] = {
    kind.name: kind
    for kind in (
        MinMax,
        MovingAverage,
        Percentile,
        MSE,
        Hessian,
        Lp,
        ACIQGaussian,
        ACIQLaplace,
        Entropy,
        PowerOfTwo,
        AdaRound,
    )
}


def build(candidate: Candidate) -> Algorithm:
    """The algorithm that ``candidate`` names.

    Raises:
        SearchSpaceError: for an unknown algorithm or parameter, with the near match.
    """
    kind = ALGORITHMS.get(candidate.algorithm)
    if kind is None:
        hint = near_match(candidate.algorithm, ALGORITHMS)
        raise SearchSpaceError(
            f"unknown algorithm {candidate.algorithm!r}{hint}; known: {', '.join(sorted(ALGORITHMS))}"
        )
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in candidate.kwargs:
        if key not in fields:
            raise SearchSpaceError(
                f"algorithm {kind.name!r} has no parameter {key!r}{near_match(key, fields)}; "
                f"it takes: {', '.join(sorted(fields)) or 'none'}"
            )
    return kind(**candidate.kwargs)


__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "BatchExtremes",
    "HistogramAccumulator",
    "Problem",
    "Statistics",
    "build",
    "solve_together",
]

"""Quantizer modules: a candidate with its parameters, ready to run.

Algorithms that learn have one file each. A new one is a file beside these and one line below.
"""

from __future__ import annotations

from dqss.errors import SearchSpaceError, near_match
from dqss.observers import ALGORITHMS as STATIC
from dqss.quantizers.base import Quantizer
from dqss.quantizers.dorefa import DoReFa
from dqss.quantizers.dsq import DSQ
from dqss.quantizers.learned import LearnedQuantizer
from dqss.quantizers.lsq import LSQ
from dqss.quantizers.lsq_plus import LSQPlus
from dqss.quantizers.pact import PACT
from dqss.quantizers.pams import PAMS
from dqss.quantizers.static import StaticQuantizer, calibrate_all
from dqss.quantizers.tqt import TQT
from dqss.spec import Candidate, Role

LEARNED: dict[str, type[LearnedQuantizer]] = {
    kind.name: kind for kind in (LSQ, LSQPlus, PACT, DoReFa, PAMS, DSQ, TQT)
}


FITTED = frozenset(name for name, kind in STATIC.items() if kind.needs_inputs)
"""Names of the algorithms that round weights to fit the inputs of their layer."""


def learned_algorithms() -> tuple[str, ...]:
    """Names of the algorithms that learn, sorted."""
    return tuple(sorted(LEARNED))


def learns(candidate: Candidate) -> bool:
    """Whether ``candidate`` has parameters that are trained with the network."""
    return candidate.algorithm in LEARNED


def shifts(algorithm: str) -> bool:
    """Whether all scales that an algorithm finds are powers of two."""
    kind = LEARNED.get(algorithm) or STATIC[algorithm]
    return kind.shifts


def check(candidate: Candidate, role: Role) -> None:
    """Refuse a candidate that cannot quantize such a tensor.

    Raises:
        SearchSpaceError: naming the algorithm and the way out; also for unknown names and parameters.
    """
    kind = LEARNED.get(candidate.algorithm)
    if kind is None:
        if candidate.algorithm not in STATIC:
            known = sorted([*STATIC, *LEARNED])
            hint = near_match(candidate.algorithm, known)
            raise SearchSpaceError(
                f"unknown algorithm {candidate.algorithm!r}{hint}; known: {', '.join(known)}"
            )
        if STATIC[candidate.algorithm].needs_inputs and role is not Role.WEIGHT:
            raise SearchSpaceError(
                f"{candidate.title} for {role.value}s: {candidate.algorithm} is for weights"
            )
        return
    for key in candidate.kwargs:
        if key not in kind.defaults:
            raise SearchSpaceError(
                f"algorithm {kind.name!r} has no parameter {key!r}{near_match(key, kind.defaults)}; "
                f"it takes: {', '.join(sorted(kind.defaults)) or 'none'}"
            )
    refusal = kind.refusal(candidate.spec, role)
    if refusal is not None:
        raise SearchSpaceError(f"{candidate.title} for {role.value}s: {kind.name} {refusal}")


def build(candidate: Candidate, channels: int, role: Role = Role.ACTIVATION) -> Quantizer:
    """The module that runs ``candidate`` on a tensor with ``channels`` scales.

    Raises:
        SearchSpaceError: see :func:`check`.
    """
    check(candidate, role)
    kind = LEARNED.get(candidate.algorithm)
    return StaticQuantizer(candidate, channels) if kind is None else kind(candidate, channels, role)


__all__ = [
    "FITTED",
    "LEARNED",
    "LearnedQuantizer",
    "Quantizer",
    "StaticQuantizer",
    "build",
    "calibrate_all",
    "check",
    "learned_algorithms",
    "learns",
]

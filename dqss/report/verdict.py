"""What a search came to, in a sentence or two, from its numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

from dqss.metrics import as_read
from dqss.report.record import Gain

SURE, LIKELY = 3.0, 2.0
"""Standard errors from which on a gain is called beyond doubt, and likely."""
FEW = 10
"""Inputs below which the standard error itself is a guess."""
NO_VALUES = ("distance", "count")


def verdict(metrics: Mapping[str, Any], gain: Gain | None) -> str:
    """Say whether the search was worth it.

    Args:
        metrics: as in ``metrics.json``.
        gain: of the exported strategy on the selection part, if it was kept.
    """
    searched, best = metrics.get("searched"), metrics.get("best_uniform")
    if not searched:
        return "There are no measurements in this folder."
    part = part_of(metrics)
    if not best:
        return f"{_told(metrics, searched, part)}. No uniform strategy exists to compare with."
    if searched["name"] == best["name"]:
        return (
            "A uniform strategy is exported: on the inputs kept for the selection "
            f"{best['name']} was better than what the search found. {_told(metrics, searched, part)}."
        )
    before, after = _distance(best, part), _distance(searched, part)
    if after > before:
        return (
            f"On the {part} data the best uniform strategy is the better one: {_told(metrics, best, part)}; "
            f"searched {_told(metrics, searched, part)}. It is not exported, since on the inputs kept for "
            f"the selection, which decide, it is not better by more than chance{_chance(gain)}."
        )
    share = f" ({1 - after / before:.0%} less)" if 0 < before < inf else ""
    return (
        f"The searched strategy is closer to the float network than the best uniform one: "
        f"{_told(metrics, searched, part)} instead of {_told(metrics, best, part)}{share} "
        f"on {searched[part]['count']} {part} inputs{_chance(gain)}."
    )


def part_of(metrics: Mapping[str, Any]) -> str:
    """The data to report on: validation where there is any."""
    row = metrics.get("searched") or {}
    return "validation" if row.get("validation") else "selection"


def readings(measured: Mapping[str, Any]) -> dict[str, str]:
    """Task metrics of one row as people read them, by name."""
    return {key: as_read(key, value) for key, value in measured.items() if key not in NO_VALUES}


def _told(metrics: Mapping[str, Any], row: Mapping[str, Any], part: str) -> str:
    measured = row[part]
    words = [*readings(measured).values(), f"{metrics['distance']} {_distance(row, part):.4f}"]
    return ", ".join(" ".join(word.split()) for word in words)


def _distance(row: Mapping[str, Any], part: str) -> float:
    """JSON has null for what is not finite."""
    value = row[part]["distance"]
    return inf if value is None else float(value)


def _chance(gain: Gain | None) -> str:
    """How sure the selection part is of the gain."""
    if gain is None or gain.error <= 0:
        return ""
    if gain.count < FEW:
        return f" (on {gain.count} inputs kept for the selection: too few to say whether by chance)"
    errors = gain.mean / gain.error
    judged = "far beyond" if errors >= SURE else "probably beyond" if errors >= LIKELY else "within"
    return (
        f" (gain on the {gain.count} inputs kept for the selection: {gain.mean:.3g} ± {gain.error:.2g}, "
        f"{judged} chance)"
    )

"""A run as plain numbers and words for the page's script."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dqss.choice import TensorChoice
from dqss.report.record import DecisionRecord, Histogram, RunRecord, TensorRecord
from dqss.report.run import Run, Trajectory

DIGITS = 4
"""Of probabilities in the page; those of the choices stand there as the strategy has them."""


def payload(run: Run) -> dict[str, Any]:
    """What the script draws of one run."""
    record = run.record
    known = {} if record is None else {(one.layer, one.role): one for one in record.tensors}
    decisions = {} if record is None else record.decisions
    return {
        "distance": run.metrics.get("distance", "distance"),
        "loss": "" if record is None else record.loss,
        "effects": None if record is None else record.effects,
        "tensors": [
            _tensor(layer, role, choice, known.get((layer, role)), decisions.get(choice.decision))
            for layer, role, choice in run.strategy.choices()
        ],
        "decisions": {name: _decision(one, name, run.trajectory) for name, one in decisions.items()},
        "trajectorySteps": [] if run.trajectory is None else run.trajectory.steps,
        "history": {name: column for name, column in run.history.items() if name != "seconds"},
        "pareto": _pareto(run.pareto),
        "distances": [] if record is None else record.distances,
        "ties": run.strategy.ties,
    }


def weight_bits(record: RunRecord | None, run: Run) -> tuple[int, float] | None:
    """Number of searched weights, and their mean bits in the strategy; None where it is not known."""
    chosen = {(layer, role): choice.bits for layer, role, choice in run.strategy.choices()}
    sizes = {} if record is None else dict(_weights(record))
    counted = [(count, chosen[key]) for key, count in sizes.items() if key in chosen]
    total = sum(count for count, _ in counted)
    return (total, sum(count * bits for count, bits in counted) / total) if total else None


def _weights(record: RunRecord) -> Iterator[tuple[tuple[str, str], int]]:
    for tensor in record.tensors:
        if tensor.role == "weight":
            count = 1
            for side in tensor.shape:
                count *= side
            yield (tensor.layer, tensor.role), count


def _tensor(
    layer: str,
    role: str,
    choice: TensorChoice,
    record: TensorRecord | None,
    decision: DecisionRecord | None,
) -> dict[str, Any]:
    candidate = choice.candidate()
    found: dict[str, Any] = {
        "layer": layer,
        "role": role,
        "label": candidate.label,
        "scheme": candidate.spec.scheme,
        "algorithm": choice.algorithm,
        "bits": choice.bits,
        "probability": choice.probability,
        "margin": choice.margin,
        "decision": choice.decision,
        "kind": "",
        "shape": [],
        "sensitivity": None if decision is None else sensitivity(decision),
    }
    if record is not None:
        histogram = None if record.histogram is None else _histogram(record.histogram)
        ranges = [[_short(x) for x in (r.low, r.high, r.lowest, r.highest)] for r in record.ranges]
        found |= {"kind": record.kind, "shape": record.shape, "histogram": histogram, "ranges": ranges}
    return found


def sensitivity(decision: DecisionRecord) -> float | None:
    """How much a decision matters: the largest of its options' effects minus the smallest."""
    return max(decision.effects) - min(decision.effects) if decision.effects else None


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {
        "low": _short(histogram.low),
        "high": _short(histogram.high),
        "counts": histogram.counts,
        "zeros": histogram.zeros,
    }


def _decision(record: DecisionRecord, name: str, trajectory: Trajectory | None) -> dict[str, Any]:
    rows = None if trajectory is None else trajectory.probabilities.get(name)
    fits = rows is not None and rows.shape[1] == len(record.labels)
    return {
        "labels": record.labels,
        "schemes": record.schemes,
        "outcome": record.outcome,
        "probabilities": [round(p, DIGITS) for p in record.probabilities],
        "effects": None if record.effects is None else [_short(effect) for effect in record.effects],
        "preferred": record.preferred,
        "chosen": record.chosen,
        "trajectory": rows.round(DIGITS - 1).tolist() if rows is not None and fits else None,
    }


def _pareto(table: list[list[str]]) -> dict[str, Any] | None:
    if len(table) < 2:
        return None
    header, *rows = table
    cells = [[_cell(cell) for cell in row] for row in rows if len(row) == len(header)]
    return {"header": header, "rows": cells}


def _cell(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _short(value: float) -> float:
    """As many digits as a picture shows; a page of many layers is small enough then."""
    return float(f"{value:.5g}")

"""The numbers of ``metrics.json``: float, uniform and searched networks side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isnan
from typing import Any

from torch import Tensor, nn

from dqss.discretize import Discretized
from dqss.measure import Context, Evaluator, MetricFactory, Variants, batches, count_of, measure_stream
from dqss.progress import Reporter
from dqss.supernet import Assignment, Supernet

REPAIRED = "repaired"
"""What the network that repair made is called among the contenders."""
Measured = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Validation:
    """Data to report on.

    Attributes:
        batches: ``(inputs, targets)``; targets may be None. Iterated once.
        metric: makes a task metric, for where there are targets.
        metric_name: what it is called.
    """

    batches: Iterable[tuple[Any, Tensor | None]] = ()
    metric: MetricFactory | None = None
    metric_name: str = "metric"


def measure_contenders(
    evaluator: Evaluator,
    outcome: Discretized,
    uniform: Mapping[str, Assignment],
    validation: Validation | None,
    oracle: bool,
    reporter: Reporter,
    repaired: nn.Module | None = None,
) -> dict[str, Any]:
    """Measure every row of ``metrics.json`` on the selection part and on the validation data.

    Of the exported strategy and what repair made of it (``repaired``), the better one on the selection
    part is ``searched``.

    ``oracle_uniform`` is the uniform strategy that is best *on the validation data*, among all
    (``oracle``) or the finalists; nobody could have chosen it, it is reported apart.
    """
    validation = validation or Validation()
    supernet = evaluator.supernet
    assignments = {**(uniform if oracle else {}), **outcome.assignments}
    same = _first_alike(assignments)
    contexts = _contexts(supernet, {name: assignments[name] for name in same.values()})
    if repaired is not None:
        contexts[REPAIRED] = lambda: supernet.running(repaired)
    loader = validation.batches
    images = len(evaluator.parts["select"]) + count_of(loader)
    with reporter.stage("measure", images) as stage:
        evaluator.advance = stage.advance
        selection = _on_selection(evaluator, contexts, validation)
        held_out = _stream(evaluator, loader, contexts, validation)
    for name, first in same.items():
        selection[name], held_out[name] = selection[first], held_out[first]
    exported = outcome.exported
    if repaired is not None and _better(selection[REPAIRED], selection[exported]):
        exported = REPAIRED
    rows: dict[str, Any] = {}
    for row, variant in {
        "float": "float",
        "best_uniform": outcome.best_uniform,
        "oracle_uniform": _oracle(held_out, uniform),
        "argmax": "argmax",
        "refined": "refined",
        "searched": exported,
        "soft": "soft",
        **({} if repaired is None else {"unrepaired": outcome.exported, "repaired": REPAIRED}),
    }.items():
        rows[row] = None if variant is None else _row(variant, selection, held_out)
    rows["finalists"] = {
        name: _row(name, selection, held_out) for name in outcome.assignments if name in uniform
    }
    rows["distance"] = evaluator.distance.name
    rows["changes"] = outcome.changes
    return rows


def _better(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """NaN is better than nothing."""
    return one["distance"] < other["distance"] or isnan(other["distance"])


def _first_alike(assignments: Mapping[str, Assignment]) -> dict[str, str]:
    """For each name the first of the same assignment: what has not changed is measured once."""
    known = list(assignments.items())
    return {name: next(first for first, other in known if other == one) for name, one in known}


def _contexts(supernet: Supernet, assignments: Mapping[str, Assignment]) -> dict[str, Context | None]:
    contexts: dict[str, Context | None] = {
        "float": None,
        "soft": lambda: supernet.mode("relaxed"),
    }
    for name, assignment in assignments.items():
        contexts[name] = lambda assignment=assignment: supernet.assign(assignment)  # type: ignore[misc]
    return contexts


def _on_selection(evaluator: Evaluator, contexts: Variants, validation: Validation) -> Measured:
    samples, part = evaluator.samples, evaluator.parts["select"]
    stream = (
        (samples.batch(indices), samples.targets(indices))
        for indices in batches(part, evaluator.forward_size)
    )
    return _stream(evaluator, stream, contexts, validation)


def _stream(
    evaluator: Evaluator,
    stream: Iterable[Any],
    contexts: Variants,
    validation: Validation,
) -> Measured:
    measured = measure_stream(
        evaluator.supernet,
        stream,
        contexts,
        evaluator.distance,
        validation.metric,
        evaluator.device,
        evaluator.advance,
    )
    for row in measured.values():
        if "metric" in row:
            row[validation.metric_name] = row.pop("metric")
    return measured


def _oracle(held_out: Measured, uniform: Mapping[str, Assignment]) -> str | None:
    known = [name for name in uniform if name in held_out and held_out[name]["count"] > 0]
    return min(known, key=lambda name: held_out[name]["distance"], default=None)


def _row(variant: str, selection: Measured, held_out: Measured) -> dict[str, Any]:
    validation = held_out[variant]
    return {
        "name": variant,
        "selection": selection[variant],
        "validation": validation if validation["count"] else None,
    }

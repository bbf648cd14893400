"""What stands on the page as words and tables: the verdict, the measurements, how to repeat them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dqss.report.payload import weight_bits
from dqss.report.record import Example
from dqss.report.run import Run
from dqss.report.verdict import part_of, readings, verdict

ROWS = {
    "float": "float",
    "best_uniform": "best uniform",
    "searched": "searched",
    "unrepaired": "searched, before the repair",
    "repaired": "repaired",
    "argmax": "argmax, before the refinement",
    "refined": "refined",
    "oracle_uniform": "uniform, chosen on the validation data",
    "soft": "soft: the mixture itself",
}
"""Rows of ``metrics.json`` in the order shown, and what the page calls them."""
MAIN = ("float", "best_uniform", "searched")


@dataclass(frozen=True)
class Measured:
    """A row of measurements on one part of the data: each as it is read, by its name."""

    count: int
    values: dict[str, str]


@dataclass(frozen=True)
class Row:
    """A network that was measured; None for a part that was not there."""

    key: str
    title: str
    name: str
    selection: Measured | None
    validation: Measured | None

    def on(self, part: str) -> Measured | None:
        """One of the two parts."""
        return self.validation if part == "validation" else self.selection


@dataclass(frozen=True)
class Headline:
    """A run in words."""

    name: str
    title: str
    verdict: str
    part: str
    rows: list[Row]
    facts: dict[str, str]
    origin: dict[str, str]
    command: str | None
    config: str | None
    strategy_uri: str
    examples: list[Example]
    examples_are_outputs: bool
    distance: str

    @property
    def main(self) -> list[Row]:
        """The three that matter, as far as they are there."""
        return [row for row in self.rows if row.key in MAIN]


def headline(run: Run, name: str) -> Headline:
    """Put a run into words."""
    record, strategy = run.record, run.strategy
    return Headline(
        name=name,
        title=f"{strategy.model.source} {strategy.model.name}",
        verdict=verdict(run.metrics, None if record is None else record.gain),
        part=part_of(run.metrics),
        rows=[_row(key, run.metrics) for key in ROWS if run.metrics.get(key)],
        facts=_facts(run),
        origin=_origin(run),
        command=run.command,
        config=run.config,
        strategy_uri="data:application/json;base64," + base64.b64encode(run.source.encode()).decode(),
        examples=[] if record is None else record.examples,
        examples_are_outputs=record is not None and record.pictures,
        distance=str(run.metrics.get("distance", "distance")),
    )


def _row(key: str, metrics: Mapping[str, Any]) -> Row:
    row, distance = metrics[key], metrics.get("distance", "distance")

    def read(part: str) -> Measured | None:
        measured = row.get(part)
        if not measured:
            return None
        value = measured["distance"]
        told = "not finite" if value is None else f"{value:.4f}"
        words = {metric: " ".join(text.split()[1:]) for metric, text in readings(measured).items()}
        return Measured(int(measured["count"]), {**words, distance: told})

    return Row(key, ROWS[key], str(row["name"]), read("selection"), read("validation"))


def _facts(run: Run) -> dict[str, str]:
    choices = [choice for _, _, choice in run.strategy.choices()]
    layers = len(run.strategy.layers)
    products = f" and {len(run.strategy.products)} products" if run.strategy.products else ""
    points = f" and {len(run.strategy.points)} points" if run.strategy.points else ""
    facts = {"layers": f"{layers}{products}{points}"}
    counted = weight_bits(run.record, run)
    if counted is not None:
        count, bits = counted
        sizes = f"{size(count * bits / 8)} instead of {size(count * 4)} in fp32"
        facts["weights"] = f"{bits:.2f} bits on average: {sizes}"
    inputs = [choice.bits for _, role, choice in run.strategy.choices() if role != "weight"]
    if inputs:
        facts["activations"] = f"{sum(inputs) / len(inputs):.2f} bits on average over {len(inputs)} tensors"
    facts |= _budget(run.strategy.budget or {})
    margins = [choice.margin for choice in choices if choice.margin is not None]
    if margins:
        close = sum(margin < 0.5 for margin in margins)
        facts["margins below 0.5"] = f"{close} of {len(margins)}"
    seconds = run.metrics.get("seconds") or {}
    if seconds:
        told = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
        facts["time"] = f"{sum(seconds.values()):.0f} s ({told})"
    if "evaluations" in run.metrics:
        evaluations, steps = run.metrics["evaluations"], run.metrics["steps"]
        facts["cost of the search"] = f"{evaluations:,} evaluations, {steps:,} steps"
    return facts


def _budget(budget: Mapping[str, Any]) -> dict[str, str]:
    """What the strategy costs of what it may, where it was searched within limits."""
    limits, achieved = (budget.get(key) for key in ("limits", "achieved"))
    if not isinstance(limits, dict) or not isinstance(achieved, dict):
        return {}
    return {
        f"budget: {name}": f"{achieved[name]:,.6g} of at most {most:,.6g}"
        for name, most in limits.items()
        if isinstance(most, int | float) and isinstance(achieved.get(name), int | float)
    }


def _origin(run: Run) -> dict[str, str]:
    strategy, record = run.strategy, run.record
    found = {
        "folder": str(run.folder.resolve()),
        "created": strategy.created,
        "search space": strategy.search_space,
        "method": strategy.method,
        "seed": str(strategy.seed),
        "weights (sha256)": strategy.model.weights_sha256,
        "prepared by": ", ".join(dict.fromkeys(step.split()[0] for step in strategy.model.prepare)),
        "dqss": strategy.dqss,
    }
    known = {name: value for name, value in found.items() if value}
    return {**known, **({} if record is None else record.versions)}


def size(count: float) -> str:
    """So many bytes for people: ``1.2 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"

"""``python -m dqss.pareto``: strategies for a list of budgets from one finished search, and their curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from dqss import __version__, cli
from dqss.apply import make_bundle
from dqss.budget import Budget, Limits
from dqss.budget.steer import Steering
from dqss.cli import CONFIG_FILE
from dqss.errors import BudgetError, near_match
from dqss.io import ensure_folder, write_text_atomic
from dqss.lit.build import build, limits_of
from dqss.lit.contenders import Validation
from dqss.lit.front import (
    FOLDER,
    Found,
    assignment_of,
    point_folder,
    points_of,
    restore_scores,
    solve_point,
    table,
)
from dqss.lit.settings import PTQSettings
from dqss.measure import Evaluator, measure_stream
from dqss.prepare import Prepared
from dqss.progress import ConsoleReporter
from dqss.report import write_report
from dqss.search import GROUPS, budget_of, settings_of
from dqss.strategy import Strategy, utc_now
from dqss.summarize import to_csv, to_markdown

OPTIONS = {"run": str, "limit": str, "points": list[float], "threads": int | None}
LIMITS = tuple(
    field.name for field in fields(Budget) if field.name not in ("latency_table", "exported_widths")
)


@cli.command("pareto")
def main(config: DictConfig) -> None:
    """Compute the points that are missing; write and print the table of all."""
    cli.check_options(config, OPTIONS, cli.OPEN_GROUPS)
    if config.limit not in LIMITS:
        raise BudgetError(
            f"limit={config.limit}{near_match(config.limit, LIMITS)}: expected one of {', '.join(LIMITS)}"
        )
    folder = Path(config.run)
    stored = cli.stored_config(folder, "run", [*GROUPS, "seed", "threads"])
    run = Strategy.load(folder)
    known = points_of(folder, config.limit)
    missing = [most for most in sorted({float(point) for point in config.points}) if most not in known]
    if missing:
        reporter = ConsoleReporter()
        with reporter.stoppable():
            _Work(config, stored, folder, run, reporter).compute(missing)
    rows = table(points_of(folder, config.limit), config.limit)
    for name, text in (("csv", to_csv(rows)), ("md", to_markdown(rows))):
        write_text_atomic(folder / FOLDER / f"{config.limit}.{name}", text)
    write_report([folder])
    Console().print(to_markdown(rows), end="", soft_wrap=True, markup=False, highlight=False)


@dataclass
class _Work:
    """The search's own network, data and candidates, built again."""

    config: DictConfig
    stored: DictConfig
    folder: Path
    run: Strategy
    reporter: ConsoleReporter

    def __post_init__(self) -> None:
        loaded, self.data, _ = cli.model_and_data(self.config, self.stored)
        space = cli.make(self.stored.search_space, "search_space")
        settings = settings_of(self.stored.method)
        if not isinstance(settings, PTQSettings):
            raise BudgetError(f"run={self.folder}: not a search with method=ptq, which budgets are for")
        self.settings = replace(settings, budget=budget_of(self.stored))
        samples, device = self.data.calibration(), torch.device("cpu")
        self.prepared: Prepared
        self.evaluator: Evaluator
        self.prepared, self.evaluator = build(
            loaded.module, samples, space, self.settings, self.stored.seed, self.folder, device, self.reporter
        )
        supernet = self.evaluator.supernet
        # Scores do not depend on limits.
        self.steering = Steering(list(supernet.decisions.values()), Limits({}, []))
        restore_scores(self.folder, self.steering)

    def compute(self, points: Sequence[float]) -> None:
        """From the smallest budget to the largest; all are feasible before the first is begun."""
        name, supernet = self.config.limit, self.evaluator.supernet
        table = self.settings.budget.latency_table if self.settings.budget else None
        given: list[dict[str, Any]] = [{name: most, "latency_table": table} for most in points]
        limits = {each[name]: limits_of(Budget(**each), self.evaluator) for each in given}
        for most in points:
            known = points_of(self.folder, name)
            smaller = [assignment_of(found, supernet) for at, found in known.items() if at < most][-1:]
            own = limits[most]
            assert own is not None
            planned = int(self.settings.refine.limit(len(self.evaluator.parts["refine"])))
            with self.reporter.stage(f"{name}={most:g}", planned) as stage:
                self.evaluator.advance = stage.advance
                found = solve_point(self.evaluator, self.steering, own, smaller, self.settings.refine)
                self._save(most, own, found)

    def _save(self, most: float, limits: Limits, found: Found) -> None:
        record = {
            "limits": {self.config.limit: most},
            "achieved": limits.achieved(found.assignment),
            "scores": self.steering.kind,
        }
        row = {"selection": {"distance": found.selection, "count": len(self.evaluator.parts["select"])}}
        row |= self._validated(found.assignment)
        bundle = make_bundle(
            self.evaluator.supernet,
            found.assignment,
            self.prepared,
            self.run.model,
            self.evaluator.samples.batch(self.evaluator.parts["search"][:1]),
            dqss=__version__,
            created=utc_now(),
            search_space=self.run.search_space,
            method="ptq",
            seed=self.run.seed,
            budget=record,
            metrics={"searched": row, "changes": found.changes},
        )
        place = ensure_folder(point_folder(self.folder, self.config.limit, most))
        write_text_atomic(place / CONFIG_FILE, (self.folder / CONFIG_FILE).read_text())
        bundle.save(place)

    def _validated(self, assignment: dict[str, int]) -> dict[str, Any]:
        loader = self.data.val_dataloader()
        if loader is None:
            return {}
        name, metric = self.data.metric()
        validation, supernet = Validation(loader, metric, name), self.evaluator.supernet
        row = measure_stream(
            supernet,
            validation.batches,
            {"point": lambda: supernet.assign(assignment)},
            self.evaluator.distance,
            validation.metric,
            self.evaluator.device,
        )["point"]
        if "metric" in row:
            row[name] = row.pop("metric")
        return {"validation": row}


if __name__ == "__main__":
    cli.run(main, cli.open_groups)

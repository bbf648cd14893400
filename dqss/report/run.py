"""A run folder as the report reads it: every file but the strategy may be missing."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import yaml  # type: ignore[import-untyped]
from safetensors import SafetensorError

from dqss.errors import StrategyError
from dqss.io import StrPath
from dqss.report.record import RunRecord
from dqss.strategy import STRATEGY_FILE, Strategy, one_line, read_bytes

METRICS_FILE, HISTORY_FILE = "metrics.json", "history.csv"
CURVES = "pareto"
"""Folder of the tables that ``python -m dqss.pareto`` writes, one a kind of limit."""
TRAJECTORY_FILE, CONFIG_FILE = "trajectory.safetensors", "config.yaml"
OVERRIDES = Path(".hydra") / "overrides.yaml"

Column = list[float | None]


@dataclass(frozen=True)
class Trajectory:
    """Probabilities of each decision's options, ``[T, K]`` by its name, after so many ``steps``."""

    steps: list[int]
    probabilities: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a search left in its folder.

    Attributes:
        folder: where.
        strategy: the choices.
        source: the text of the strategy file.
        metrics: as in ``metrics.json``.
        history: columns of ``history.csv``; None where a step has no value.
        record: what was kept for the report alone.
        trajectory: of the probabilities.
        pareto: header and rows of the tables in ``pareto/``; of several what they have in common.
        command: that began the search; None where it was begun from Python.
        config: the text of the configuration.
    """

    folder: Path
    strategy: Strategy
    source: str
    metrics: dict[str, Any]
    history: dict[str, Column]
    record: RunRecord | None
    trajectory: Trajectory | None
    pareto: list[list[str]]
    command: str | None
    config: str | None

    @classmethod
    def read(cls, path: StrPath) -> Run:
        """Read the folder of a finished search, or what is left of one.

        Raises:
            StrategyError: where there is no strategy, or a file is damaged.
        """
        folder = Path(path)
        strategy = Strategy.load(folder)
        folder = folder if folder.is_dir() else folder.parent
        return cls(
            folder=folder,
            strategy=strategy,
            source=read_bytes(folder / STRATEGY_FILE).decode("utf-8-sig"),
            metrics=_json(folder / METRICS_FILE),
            history=_columns(folder / HISTORY_FILE),
            record=RunRecord.load(folder),
            trajectory=_trajectory(folder / TRAJECTORY_FILE),
            pareto=_curves(folder / CURVES),
            command=_command(folder / OVERRIDES),
            config=_text(folder / CONFIG_FILE),
        )


def _text(file: Path) -> str | None:
    if not file.exists():
        return None
    try:
        return read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _damaged(file, error) from error


def _json(file: Path) -> dict[str, Any]:
    text = _text(file)
    try:
        found = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, error) from error
    if not isinstance(found, dict):
        raise _damaged(file, ValueError("not a JSON object"))
    return found


def _table(file: Path) -> list[list[str]]:
    text = _text(file)
    return [] if text is None else [row for row in csv.reader(text.splitlines()) if row]


def _curves(folder: Path) -> list[list[str]]:
    """All points as one table, each with the limit that it is for if there are several kinds."""
    tables = {file.stem: table for file in sorted(folder.glob("*.csv")) if (table := _table(file))}
    if len(tables) < 2:
        return next(iter(tables.values()), [])
    headers = [table[0] for table in tables.values()]
    common = [name for name in headers[0] if all(name in header for header in headers)]
    found = [["limit", *common]]
    for limit, (header, *rows) in tables.items():
        places = [header.index(name) for name in common]
        found += [[limit, *(row[k] for k in places)] for row in rows if len(row) == len(header)]
    return found


def _columns(file: Path) -> dict[str, Column]:
    rows = _table(file)
    if not rows:
        return {}
    header, *lines = rows
    try:
        numbers = [[float(cell) if cell else None for cell in line] for line in lines]
    except ValueError as error:
        raise _damaged(file, error) from error
    if any(len(line) != len(header) for line in numbers):
        raise _damaged(file, ValueError("rows of several lengths"))
    return {name: [line[k] for line in numbers] for k, name in enumerate(header)}


def _trajectory(file: Path) -> Trajectory | None:
    if not file.exists():
        return None
    prefix = "probabilities."
    try:
        tensors: Mapping[str, Any] = safetensors.numpy.load(read_bytes(file))
        steps = [int(step) for step in tensors["steps"]]
        found = {
            name.removeprefix(prefix): rows.astype(np.float64)
            for name, rows in tensors.items()
            if name.startswith(prefix) and rows.ndim == 2 and len(rows) == len(steps)
        }
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _damaged(file, error) from error
    return Trajectory(steps, found)


def _command(file: Path) -> str | None:
    """The command line that Hydra recorded."""
    text = _text(file)
    if text is None:
        return None
    try:
        words = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _damaged(file, error) from error
    return shlex.join(["python", "-m", "dqss.search", *map(str, words or ())])


def _damaged(file: Path, error: Exception) -> StrategyError:
    return StrategyError(
        one_line(f"{file}: damaged ({' '.join(str(error).split())[:120]}): restore it, or remove it")
    )

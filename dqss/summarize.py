"""``python -m dqss.summarize SWEEP_DIR``: all runs of a sweep in one table, whatever became of them."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from dqss.errors import OutputError, UserError
from dqss.io import write_text_atomic
from dqss.strategy import STRATEGY_FILE
from dqss.sweep import FAILED_FILE

CSV_FILE, MARKDOWN_FILE = "summary.csv", "summary.md"
ROWS = ("float", "best_uniform", "searched")
_PLACES = ("run_dir", "logger", "hydra", "resume")
Row = dict[str, Any]


@dataclass
class Run:
    """One folder.

    Attributes:
        name: of the folder.
        state: ``finished``, ``unfinished``, ``failed`` or ``damaged``.
        note: why, for the last two.
        config: its options by dotted name.
        measured: what was found, by column.
    """

    name: str
    state: str
    note: str = ""
    config: Row = field(default_factory=dict)
    measured: Row = field(default_factory=dict)


def read_run(folder: Path) -> Run:
    """What a run folder tells; nothing in it makes this fail."""
    config = _config(folder)
    if (folder / FAILED_FILE).exists():
        return Run(folder.name, "failed", _text(folder / FAILED_FILE), config)
    if not (folder / STRATEGY_FILE).exists():
        return Run(folder.name, "unfinished", config=config)
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        strategy = json.loads((folder / STRATEGY_FILE).read_text())
        return Run(folder.name, "finished", config=config, measured=dict(_columns(metrics, strategy)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
        return Run(folder.name, "damaged", reason, config)


def table(runs: Sequence[Run]) -> list[Row]:
    """A row a run: its folder and state, the options in which runs differ, and what was measured."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    differ = [key for key in keys if len({repr(run.config.get(key)) for run in runs if run.config}) > 1]
    columns = dict.fromkeys(key for run in runs for key in run.measured)
    ordered = sorted(runs, key=lambda run: [str(run.config.get(key)) for key in differ])
    return [
        {
            "run": run.name,
            **{key: run.config.get(key, "") for key in differ},
            "state": run.state,
            **{key: run.measured.get(key, "") for key in columns},
            "note": run.note,
        }
        for run in ordered
    ]


def to_csv(rows: Sequence[Row]) -> str:
    """All digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(rows: Sequence[Row]) -> str:
    """Four significant digits; columns without any entry are left out."""
    columns = [key for key in rows[0] if any(row[key] != "" for row in rows)]
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row[key]) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def summarize(folder: Path) -> list[Row]:
    """Write both tables into a sweep folder.

    Raises:
        UserError: where there is no run in it.
    """
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder; give the folder of a sweep (its run_dir=)")
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [path for path in inside if _is_run(path)]
    if not found:
        raise OutputError(f"{folder}: no run in it; give the folder of a sweep (its run_dir=)")
    rows = table([read_run(path) for path in found])
    write_text_atomic(folder / CSV_FILE, to_csv(rows))
    write_text_atomic(folder / MARKDOWN_FILE, to_markdown(rows))
    return rows


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("config.yaml", ".hydra", STRATEGY_FILE, FAILED_FILE))


def _config(folder: Path) -> Row:
    for file in (folder / "config.yaml", folder / ".hydra" / "config.yaml"):
        try:
            tree = yaml.safe_load(file.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        if isinstance(tree, dict):
            return dict(_flat({key: value for key, value in tree.items() if key not in _PLACES}))
    return {}


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _columns(metrics: Row, strategy: Row) -> Iterator[tuple[str, Any]]:
    for name in ROWS:
        row = metrics[name]
        for part in ("selection", "validation"):
            measured = None if row is None else row[part]
            for key, value in (measured or {}).items():
                if key != "count" and not (name == "float" and key == "distance"):
                    yield f"{name} {key if key != 'distance' else metrics['distance']} ({part})", value
    budget = strategy["budget"]
    for key, value in (budget["achieved"] if budget else {}).items():
        yield key, value
    yield "evaluations", metrics["evaluations"]
    yield "seconds", sum(metrics["seconds"].values())


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")


def _text(file: Path) -> str:
    try:
        return " ".join(file.read_text(errors="replace").split())
    except OSError as error:
        return str(error)


def main() -> None:
    """Read the folder, write and print the table."""
    parser = argparse.ArgumentParser(prog="python -m dqss.summarize", description=__doc__)
    parser.add_argument("folder", type=Path, help="of a sweep: the run_dir= of its search -m")
    folder = parser.parse_args().folder
    try:
        rows = summarize(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(to_markdown(rows), end="")
    print(f"in {folder / CSV_FILE} and {MARKDOWN_FILE}")


if __name__ == "__main__":
    main()

"""Run folders to one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from dqss.io import StrPath, finite_json, write_text_atomic
from dqss.report.headline import Headline, headline
from dqss.report.payload import payload
from dqss.report.run import Run

REPORT_FILE = "report.html"
TEMPLATE = "report.html.j2"
SCRIPTS = ("colours.js", "charts.js", "details.js", "table.js", "page.js")
"""In the order in which they stand in the page."""
STYLE = "report.css"


def write_report(folders: Sequence[StrPath], file: StrPath | None = None) -> Path:
    """Write the report of one run, or of several side by side.

    Args:
        folders: of finished searches.
        file: where to; by default ``report.html`` in the folder of the first.

    Returns:
        The file.

    Raises:
        StrategyError: for a folder without a strategy, or with a damaged file.
        OutputError: where the file cannot be written.
    """
    runs = [Run.read(folder) for folder in folders]
    target = runs[0].folder / REPORT_FILE if file is None else Path(file)
    write_text_atomic(target, render(runs))
    return target


def render(runs: Sequence[Run]) -> str:
    """The page of at least one run, as text."""
    # Autoescape: every name in a run folder may come from a stranger's model.
    environment = Environment(
        loader=PackageLoader("dqss.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = names_of(runs)
    data = [{"name": name, **payload(run)} for name, run in zip(names, runs, strict=True)]
    plotly, script = get_plotlyjs(), _script()
    heads: list[Headline] = [headline(run, name) for run, name in zip(runs, names, strict=True)]
    return environment.get_template(TEMPLATE).render(
        heads=heads,
        data=finite_json(data),
        style=_asset(STYLE),
        plotly=plotly,
        script=script,
        hashes=[_hash(plotly), _hash(script)],
    )


def names_of(runs: Sequence[Run]) -> list[str]:
    """What tells the folders apart: the last part of each path, or all of it where that is not enough."""
    short = [run.folder.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def _script() -> str:
    body = "\n".join(_asset(name) for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{body}}})();\n'


def _asset(name: str) -> str:
    return files("dqss.report").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """What the page's own rules call a script that may run; any other one may not."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

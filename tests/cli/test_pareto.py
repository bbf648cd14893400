"""The curve of cost and quality from one search, point by point."""

import csv
import json
import os
from pathlib import Path

import pytest

from dqss.lit.front import dominates
from dqss.report.run import Run
from tests.cli.runner import TINY, call

MIXED = ("search_space.weight_bits=[2,3,4]", "method.steps=8", "budget.average_weight_bits=3")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched") / "run"
    outcome = call("search", *TINY, *MIXED, f"run_dir={folder}", cwd=folder.parent)
    assert outcome.code == 0, outcome.err
    assert call("pareto", f"run={folder}", "points=[3.5,2.25]", cwd=folder.parent).code == 0
    return folder


def point(run: Path, most: str) -> Path:
    return run / "pareto" / f"average_weight_bits_{most}"


def test_every_point_is_within_its_budget_and_a_bundle_of_its_own(run: Path, tmp_path: Path) -> None:
    for most in ("2.25", "3.5"):
        strategy = json.loads((point(run, most) / "strategy.json").read_text())
        assert strategy["budget"]["limits"] == {"average_weight_bits": float(most)}
        assert strategy["budget"]["achieved"]["average_weight_bits"] <= float(most)
        assert strategy["budget"]["scores"] == "measured effects"
        outcome = call("evaluate", f"strategy={point(run, most)}", f"run_dir={most}", cwd=tmp_path)
        assert outcome.code == 0, outcome.err
        again = json.loads((tmp_path / most / "metrics.json").read_text())["searched"]["validation"]
        assert again == strategy["metrics"]["searched"]["validation"]


def test_a_point_that_comes_later_leaves_the_others_as_they_are(run: Path) -> None:
    before = {most: os.stat(point(run, most) / "strategy.json").st_mtime_ns for most in ("2.25", "3.5")}
    outcome = call("pareto", f"run={run}", "points=[3,3.5]", cwd=run.parent)
    assert outcome.code == 0, outcome.err
    assert "average_weight_bits=3 " in outcome.err and "average_weight_bits=3.5" not in outcome.err
    after = {most: os.stat(point(run, most) / "strategy.json").st_mtime_ns for most in before}
    assert after == before
    with (run / "pareto" / "average_weight_bits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["budget"]) for row in rows] == [2.25, 3.0, 3.5]
    found = [(float(row["average_weight_bits"]), float(row["distance (validation)"])) for row in rows]
    for row, (cost, quality) in zip(rows, found, strict=True):
        beaten = any(c <= cost and q <= quality and (c, q) != (cost, quality) for c, q in found)
        assert row["dominated"] == str(beaten)
    shown = Run.read(run).pareto
    assert shown[0][0] == "budget" and [float(line[0]) for line in shown[1:]] == [2.25, 3.0, 3.5]
    assert '"pareto": {"header": ["budget"' in (run / "report.html").read_text()
    lines = [line for line in outcome.out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3


def test_dominance_is_no_worse_in_both_and_better_in_one() -> None:
    row = {"cost": 2.0, "kl": 1.0}
    assert not dominates(row, dict(row), "cost", "kl")
    assert dominates(row, {"cost": 2.0, "kl": 1.1}, "cost", "kl")
    assert dominates(row, {"cost": 2.1, "kl": 1.0}, "cost", "kl")
    assert not dominates(row, {"cost": 1.9, "kl": 1.1}, "cost", "kl")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["limit=average_weight_bit", "points=[3]"], "did you mean 'average_weight_bits'"),
        (["points=[1.5]"], "budget.average_weight_bits=1.5: the search space allows no less than 2 bits"),
        (["points=3"], "points=3: expected a list of numbers"),
        (["limit=latency_ms", "points=[3]"], "budget.latency_ms needs measurements"),
        (["run=nowhere", "points=[3]"], "run=nowhere: no config.yaml there"),
    ],
)
def test_bad_points_are_one_line(run: Path, tmp_path: Path, words: list[str], expected: str) -> None:
    assert expected in call("pareto", f"run={run}", *words, cwd=tmp_path).error

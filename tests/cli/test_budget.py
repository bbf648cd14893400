"""Budgets on the command line: limits by option, one line for what cannot be kept, the record in the file."""

import json
from pathlib import Path

import pytest

from tests.cli.runner import TINY, call

MIXED = "search_space.weight_bits=[2,3,4]"


def test_a_limit_is_kept_recorded_and_printed(tmp_path: Path) -> None:
    words = (*TINY, MIXED, "run_dir=out", "budget.average_weight_bits=2.5", "budget.size_mb=0.2")
    outcome = call("search", *words, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    budget = json.loads((tmp_path / "out" / "strategy.json").read_text())["budget"]
    assert budget["limits"] == {"average_weight_bits": 2.5, "size_mb": 0.2}
    assert 2 <= budget["achieved"]["average_weight_bits"] <= 2.5
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("budget average_weight_bits")]
    assert line == f"budget average_weight_bits: {budget['achieved']['average_weight_bits']:.6g} of 2.5"


def test_sizes_as_exported_are_those_of_the_target(tmp_path: Path) -> None:
    found = {}
    for target in ("generic", "tensorrt"):
        words = [
            f"target={target}",
            "search_space.activation_bits=8",
            "search_space.activation_symmetric=true",
        ]
        words += ["budget.size_mb=9", f"run_dir={target}"]
        assert call("search", *TINY, *words, cwd=tmp_path).code == 0
        found[target] = json.loads((tmp_path / target / "strategy.json").read_text())["budget"]["achieved"]
    # Two bits take four in the one and a byte in the other.
    assert found["tensorrt"]["exported_size_mb"] > 1.8 * found["generic"]["exported_size_mb"]
    assert found["tensorrt"]["size_mb"] == found["generic"]["size_mb"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["budget.size_mb=0.01"], "budget.size_mb=0.01: the search space allows no less than"),
        (["budget.size=3"], "budget.size: unknown option (did you mean 'size_mb'?)"),
        (["budget.size_mb=big"], "budget.size_mb=big: expected a number or null"),
        (["budget.size_mb=-1"], "budget.size_mb=-1: expected a positive number"),
        (["budget.latency_ms=3"], "budget.latency_ms needs measurements"),
        (["budget.latency_ms=3", "budget.latency_table=none.csv"], "none.csv: cannot be read"),
    ],
)
@pytest.mark.parametrize("dry", [(), ("dry_run=true",)])
def test_bad_limits_are_one_line(
    tmp_path: Path, words: list[str], expected: str, dry: tuple[str, ...]
) -> None:
    assert expected in call("search", *TINY, "run_dir=out", *words, *dry, cwd=tmp_path).error
    assert not (tmp_path / "out" / "strategy.json").exists()

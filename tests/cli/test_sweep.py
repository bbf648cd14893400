"""A sweep: killed, begun again in its folder, and summed up by one command."""

import csv
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.cli.runner import TINY, Outcome, call, finish, results, spawn

SWEEP = ("-m", *TINY, "seed=0,1", "search_space.weight_bits=[4],[4,8]", "run_dir=sweep")


def runs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert call("search", *SWEEP, cwd=folder).code == 0
    return folder / "sweep"


def test_a_sweep_makes_a_folder_for_each_run_named_by_what_it_does(whole: Path) -> None:
    assert len(runs(whole)) == 4
    assert all((run / "strategy.json").exists() and len(run.name) == 12 for run in runs(whole))


def test_a_sweep_that_was_killed_goes_on_and_ends_as_one_that_was_not(whole: Path, tmp_path: Path) -> None:
    process = spawn("search", *SWEEP, cwd=tmp_path)
    deadline = time.monotonic() + 120

    def second_has_begun() -> bool:
        journals = list((tmp_path / "sweep").glob("*/measured.jsonl"))
        return len(journals) >= 2

    while not second_has_begun() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = [run.name for run in runs(tmp_path / "sweep") if (run / "strategy.json").exists()]
    assert 1 <= len(done) < 4
    before = {name: (tmp_path / "sweep" / name / "strategy.json").stat().st_mtime_ns for name in done}
    outcome = finish(spawn("search", *SWEEP, cwd=tmp_path))
    assert outcome.code == 0, outcome.err
    assert all(f"{name}: finished already" in outcome.out for name in done)
    after = {name: (tmp_path / "sweep" / name / "strategy.json").stat().st_mtime_ns for name in done}
    assert after == before
    found, wanted = ({run.name: results(run) for run in runs(place)} for place in (tmp_path / "sweep", whole))
    assert found == wanted


def test_other_loggers_and_time_limits_are_the_same_run(whole: Path) -> None:
    names = [run.name for run in runs(whole)]
    words = (*SWEEP, "logger=none", "method.max_minutes=9")
    outcome = call("search", *words, cwd=whole.parent)
    assert outcome.code == 0 and outcome.out.count("finished already") == 4
    assert [run.name for run in runs(whole)] == names


@pytest.fixture
def mixed(whole: Path, tmp_path: Path) -> Path:
    """A finished, an unfinished, a damaged and a failed run."""
    shutil.copytree(whole, tmp_path / "sweep")
    _, unfinished, damaged, failed = runs(tmp_path / "sweep")
    (unfinished / "strategy.json").unlink()
    (damaged / "metrics.json").write_text("{")
    (failed / "failed.txt").write_text("the disk | is full\n")
    (tmp_path / "sweep" / "notes").mkdir()
    return tmp_path / "sweep"


def summary(folder: Path) -> tuple[Outcome, list[dict[str, str]]]:
    outcome = call("summarize", folder, cwd=folder)
    with (folder / "summary.csv").open(newline="") as file:
        return outcome, list(csv.DictReader(file))


def test_all_runs_are_in_one_table_whatever_became_of_them(mixed: Path) -> None:
    outcome, rows = summary(mixed)
    assert outcome.code == 0
    states = {row["run"]: row["state"] for row in rows}
    assert list(states) and [states[run.name] for run in runs(mixed) if run.name != "notes"] == [
        "finished", "unfinished", "damaged", "failed",
    ]  # fmt: skip
    assert {(row["seed"], row["search_space.weight_bits"]) for row in rows} == {
        (seed, bits) for seed in "01" for bits in ("[4]", "[4, 8]")
    }
    (finished,) = [row for row in rows if row["state"] == "finished"]
    measured = results(mixed / finished["run"])["metrics"]["searched"]["validation"]  # type: ignore[index]
    assert float(finished["searched kl (validation)"]) == measured["distance"]
    assert "the disk \\| is full" in (mixed / "summary.md").read_text()
    lines = [line for line in outcome.out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4 and len({line.replace("\\|", "").count("|") for line in lines}) == 1


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_a_folder_without_runs_is_one_line(tmp_path: Path, place: str) -> None:
    assert "give the folder of a sweep" in call("summarize", place, cwd=tmp_path).error


def test_a_run_that_fails_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    words = ("-m", *TINY, "seed=0", "budget.size_mb=0.001,9", "run_dir=sweep")
    for _ in range(2):
        outcome = call("search", *words, cwd=tmp_path)
        assert outcome.code == 2 and "1 runs failed" in outcome.err and "no less than" in outcome.err
        _, rows = summary(tmp_path / "sweep")
        assert sorted(row["state"] for row in rows) == ["failed", "finished"]
        (failed,) = [row for row in rows if row["state"] == "failed"]
        assert failed["budget.size_mb"] == "0.001" and "no less than" in failed["note"]

"""Interrupting a search at any moment loses nothing: resumed, it ends where it would have ended."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dqss.bundle import Bundle
from dqss.io import Journal
from dqss.lit.checkpoint import LAST
from dqss.lit.ptq import PTQSearch, StepBatches
from dqss.measure import Evaluator
from tests.cli.runner import TINY, call, finish, results, spawn


class Killed(BaseException):
    """Ends a run as abruptly as an exception can."""


@pytest.fixture(scope="module")
def words(images: Path) -> tuple[str, ...]:
    """Two batches an epoch, a checkpoint every other step: most moments are in the middle of both."""
    return (
        *TINY,
        "data=imagefolder",
        f"data.calibration_dir={images}",
        "data.calibration_images=40",
        "method.steps=7",
        "method.batch_size=9",
        "method.checkpoint_every=2",
        "method.discrete_every=3",
        "method.discrete_images=5",
        "method.refine.passes=3",
        "method.refine.screen=4",
    )


@pytest.fixture(scope="module")
def undisturbed(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the search that nobody interrupts."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert call("search", *words, "run_dir=run", cwd=folder).code == 0
    return folder / "run"


def after(calls: int, function: Callable, error: BaseException | Callable[[], None]) -> Callable:
    """``function``, but the given call of it does not come to its end."""
    count = 0

    def counting(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:
            if isinstance(error, BaseException):
                raise error
            error()
        return function(*args, **kwargs)

    return counting


MOMENTS: dict[str, tuple[type, str, float]] = {
    "before the first step": (PTQSearch, "training_step", 1),
    "at a step without checkpoint": (PTQSearch, "training_step", 4),
    "at the last step": (PTQSearch, "training_step", 7),
    "while measuring in a step": (Journal, "put", 3),
    "while measuring the effects": (Evaluator, "first_order", 1),
    "after a third of the measurements": (Journal, "put", 1 / 3),
    "after most of the measurements": (Journal, "put", 0.9),
    "just before writing": (Bundle, "save", 1),
}
"""What is called at that moment, and for which time, or after which share of its times."""


def at(moment: str, folder: Path, error: BaseException | Callable[[], None]) -> tuple[type, str, Callable]:
    """What to patch for a moment; ``folder`` is of an undisturbed search."""
    owner, name, calls = MOMENTS[moment]
    if calls < 1:
        calls *= rows(folder / "measured.jsonl")
    return owner, name, after(int(calls), getattr(owner, name), error)


def rows(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> Path:
    """The folder of a search that was cut short in its fifth step."""
    with monkeypatch.context() as patch:
        patch.setattr(PTQSearch, "training_step", after(5, PTQSearch.training_step, Killed()))
        with pytest.raises(Killed):
            call("search", *words, "run_dir=run", cwd=tmp_path)
    return tmp_path / "run"


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    undisturbed: Path,
    moment: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(*at(moment, undisturbed, Killed()))
        with pytest.raises(Killed):
            call("search", *words, "run_dir=run", cwd=tmp_path)
    assert not (tmp_path / "run" / "strategy.json").exists()
    outcome = call("search", "resume=run", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert results(tmp_path / "run") == results(undisturbed)


SWITCHES = (
    "method.steps=40",
    "method.settle.margin=0.9",
    "method.settle.patience=3",
    "method.stop_after=2",
    "method.recompute=auto",
)
"""Decisions are frozen on the way, and the search ends before its last step."""


@pytest.fixture(scope="module")
def switched(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed search with every switch on."""
    folder = tmp_path_factory.mktemp("switched")
    assert call("search", *words, *SWITCHES, "run_dir=run", cwd=folder).code == 0
    return folder / "run"


@pytest.mark.parametrize("moment", ["a decision freezes", "the step before", "the last step", "the end"])
def test_killed_with_every_switch_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    switched: Path,
    moment: str,
) -> None:
    history = results(switched)["history"]
    assert isinstance(history, list)
    frozen = [int(row["frozen"]) for row in history]
    first = next(step for step, count in enumerate(frozen) if count)
    assert first < len(frozen) - 3 and len(frozen) < 40 and frozen[-1] < 40
    step = {"a decision freezes": first, "the step before": first - 1, "the last step": len(frozen) - 1}
    killed = at("while measuring the effects", switched, Killed())
    if moment in step:
        killed = PTQSearch, "training_step", after(1 + step[moment], PTQSearch.training_step, Killed())
    with monkeypatch.context() as patch:
        patch.setattr(*killed)
        with pytest.raises(Killed):
            call("search", *words, *SWITCHES, "run_dir=run", cwd=tmp_path)
    outcome = call("search", "resume=run", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert results(tmp_path / "run") == results(switched)


def test_the_log_of_a_resumed_search_has_every_step(interrupted: Path, tmp_path: Path) -> None:
    assert call("search", "resume=run", cwd=tmp_path).code == 0
    lines = (tmp_path / "run" / "logs" / "metrics.csv").read_text().splitlines()
    assert [line.rpartition(",")[2] for line in lines[1:]] == [str(step) for step in range(7)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["at a step without checkpoint", "after a third of the measurements"])
def test_signals_stop_at_the_next_safe_point(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    undisturbed: Path,
    number: signal.Signals,
    moment: str,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(*at(moment, undisturbed, lambda: os.kill(os.getpid(), number)))
        outcome = call("search", *words, "run_dir=run", cwd=tmp_path)
    assert outcome.code == 128 + number
    assert f"python -m dqss.search resume={tmp_path / 'run'}" in outcome.err
    assert outcome.err.rstrip().endswith(f"stopped by {number.name}")
    if "step" in moment:  # where the signal came there was no checkpoint due
        assert rows(tmp_path / "run" / "history.csv") == 1 + 4
    assert call("search", "resume=run", cwd=tmp_path).code == 0
    assert results(tmp_path / "run") == results(undisturbed)


def test_batches_from_any_step_on_are_those_of_the_whole_search() -> None:
    part = list(range(100, 123))
    whole = list(StepBatches(part, 5, steps=20, seed=3))
    assert all(list(StepBatches(part, 5, steps=20, seed=3, start=k)) == whole[k:] for k in range(20))
    epochs = [{index for batch in whole[4 * k : 4 * k + 4] for index in batch} for k in range(5)]
    assert all(len(epoch) == 20 for epoch in epochs)
    assert epochs[0] != epochs[1]  # others are left out


def test_only_what_leaves_the_search_as_it_is_may_be_said_anew(
    tmp_path: Path, interrupted: Path, words: tuple[str, ...], undisturbed: Path
) -> None:
    run = interrupted
    record = (run / ".hydra" / "overrides.yaml").read_text()
    for word in ("method.steps=8", "model=resnet20", "+trainer.max_time=1", "seed=1", "dry_run=true"):
        error = call("search", "resume=run", word, cwd=tmp_path).error
        assert f"leave out {word!r}" in error
    error = call("search", *words, "run_dir=run", cwd=tmp_path).error
    assert "holds an interrupted search: go on with resume=" in error
    # The same command once more, and from a folder that has moved.
    moved = run.rename(tmp_path / "moved = here")
    anew = ("logger=none", "method.max_minutes=9", "method.recompute=auto")
    place = ("run_dir=moved = here", 'resume="moved = here"')
    outcome = call("search", *words, *anew, *place, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert results(moved) == results(undisturbed)
    assert not run.exists()
    assert (moved / ".hydra" / "overrides.yaml").read_text() == record


def test_a_damaged_checkpoint_is_named(tmp_path: Path, interrupted: Path) -> None:
    file = interrupted / LAST
    file.write_bytes(file.read_bytes()[:-50])
    assert str(LAST) in call("search", "resume=run", cwd=tmp_path).error
    config = interrupted / "config.yaml"
    stored = OmegaConf.load(config)
    stored.seed = 1
    OmegaConf.save(stored, config)
    error = call("search", "resume=run", cwd=tmp_path).error
    assert "holds a search with other" in error and "seed" in error


# -- processes that are really killed ---------------------------------------------------------


REACHED: dict[str, Callable[[Path], bool]] = {
    "journal": lambda run: rows(run / "measured.jsonl") >= 1,
    "steps": lambda run: rows(run / "history.csv") > 4,
    "all steps": lambda run: rows(run / "history.csv") > 7,
    "refinement": lambda run: rows(run / "measured.jsonl") > 8,
    "selection": lambda run: rows(run / "measured.jsonl") > 30,
}


def kill_when(reached: Callable[[Path], bool], run: Path, *words: str, cwd: Path, fuse: bool) -> None:
    process = spawn("search", *words, cwd=cwd, fuse=fuse)
    deadline = time.monotonic() + 120
    while not reached(run) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(random.uniform(0.0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.communicate()


def kill_and_resume(
    folder: Path, words: tuple[str, ...], moments: list[str], fuse: bool
) -> dict[str, object]:
    next_words: tuple[str, ...] = (*words, "run_dir=run")
    for moment in moments:
        kill_when(REACHED[moment], folder / "run", *next_words, cwd=folder, fuse=fuse)
        next_words = ("resume=run",)
    outcome = finish(spawn("search", *next_words, cwd=folder, fuse=fuse))
    done = outcome.code == 2 and "this search is finished" in outcome.err
    assert outcome.code == 0 or done, outcome.err
    return results(folder / "run")


def test_two_kills(tmp_path: Path, words: tuple[str, ...], undisturbed: Path) -> None:
    assert kill_and_resume(tmp_path, words, ["steps", "refinement"], fuse=False) == results(undisturbed)


@pytest.mark.slow
def test_five_kills(tmp_path: Path, words: tuple[str, ...]) -> None:
    """With fused kernels, as a user has them."""
    assert finish(spawn("search", *words, "run_dir=whole", cwd=tmp_path, fuse=True)).code == 0
    assert kill_and_resume(tmp_path, words, list(REACHED), fuse=True) == results(tmp_path / "whole")


def test_a_second_signal_stops_at_once(tmp_path: Path, words: tuple[str, ...]) -> None:
    # A search that would measure for minutes: nobody waits for its next safe point.
    stuck = "import dqss.lit.ptq, time; dqss.lit.ptq.PTQSearch.training_step = lambda *_: time.sleep(100)"
    process = spawn("search", *words, "run_dir=run", cwd=tmp_path, prelude=stuck)
    deadline = time.monotonic() + 60
    while not REACHED["journal"](tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    outcome = finish(process, timeout=5)
    assert outcome.code == 143
    assert json.loads((tmp_path / "run" / "measured.jsonl").read_text().splitlines()[0])["key"] == "identity"

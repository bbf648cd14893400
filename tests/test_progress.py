"""What is said while something runs, to whom, and how much."""

import io

import pytest
from rich.console import Console

from dqss.errors import UserError
from dqss.progress import ConsoleReporter, Interrupted, Progressing, _PlainStage, as_clock


@pytest.mark.parametrize(
    ("word", "variable", "terminal", "wanted"),
    [
        ("auto", None, True, "bars"),
        ("auto", None, False, "plain"),
        ("auto", "", True, "bars"),
        ("auto", "quiet", True, "quiet"),
        ("auto", "auto", False, "plain"),
        ("bars", "quiet", False, "bars"),
        ("plain", None, True, "plain"),
        ("quiet", "bars", True, "quiet"),
    ],
)
def test_the_word_then_the_environment_then_the_terminal(word, variable, terminal, wanted) -> None:
    environment = {} if variable is None else {"DQSS_PROGRESS": variable}
    assert Progressing.chosen(word, terminal, environment) is Progressing(wanted)


def test_other_words_are_refused_where_they_stand() -> None:
    with pytest.raises(UserError, match="progress=loud: expected auto, bars, plain, quiet"):
        Progressing.chosen("loud", True, {})
    with pytest.raises(UserError, match="DQSS_PROGRESS=loud: expected"):
        Progressing.chosen("auto", True, {"DQSS_PROGRESS": "loud"})


def reporter(progress: str, terminal: bool = False) -> tuple[ConsoleReporter, io.StringIO]:
    out = io.StringIO()
    return ConsoleReporter(Console(file=out, force_terminal=terminal, width=80), progress), out


def test_bars_count_and_say_how_long_it_takes() -> None:
    shown, out = reporter("bars", terminal=True)
    with shown.stage("search", 4) as stage:
        stage.advance(3)
        stage.advance()
    assert "search" in out.getvalue() and "4/4" in out.getvalue() and "left" in out.getvalue()


def test_quiet_says_nothing_and_still_stops() -> None:
    shown, out = reporter("quiet")
    shown.say("a line")
    with shown.stage("search", 4) as stage:
        stage.advance()
        shown.stop_signal = 15
        with pytest.raises(Interrupted):
            stage.advance()
    assert out.getvalue() == ""


def test_lines_come_now_and_then_with_the_time_left() -> None:
    shown, out = reporter("plain")
    now = 0.0
    stage = _PlainStage(shown, "search", 1000, clock=lambda: now)
    # Two hundred were done before the interruption; then two a second.
    stage.advance(200)
    for _ in range(200):
        now += 0.5
        stage.advance()
    assert out.getvalue().splitlines() == [
        "search 260/1000, 6:10 left",
        "search 320/1000, 5:40 left",
        "search 380/1000, 5:10 left",
    ]


def test_a_stage_that_is_longer_than_was_thought_makes_no_promises() -> None:
    shown, out = reporter("plain")
    now = 0.0
    stage = _PlainStage(shown, "discretize", 10, clock=lambda: now)
    for _ in range(5):
        now += 100.0
        stage.advance(4)
    assert out.getvalue().splitlines() == ["discretize 8/10, 0:50 left"]


def test_times_as_people_read_them() -> None:
    assert [as_clock(seconds) for seconds in (0, 59.6, 65, 7209)] == ["0:00", "1:00", "1:05", "2:00:09"]

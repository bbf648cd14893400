"""What the user sees while something runs, and where a running stage may be stopped."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dqss.errors import UserError

PLAIN_EVERY = 30.0
"""Seconds between two lines about the same stage in a log."""
VARIABLE = "DQSS_PROGRESS"


class Progressing(Enum):
    """How progress is shown: bars that move, lines for logs and CI, or nothing but what went wrong."""

    BARS = "bars"
    PLAIN = "plain"
    QUIET = "quiet"

    @classmethod
    def chosen(cls, word: str, terminal: bool, environment: Mapping[str, str] = os.environ) -> Progressing:
        """What ``progress=WORD`` asks for.

        Args:
            word: a value, or ``auto``: the environment's word, else bars on a terminal and lines elsewhere.
            terminal: whether there is one.
            environment: where ``$DQSS_PROGRESS`` is.

        Raises:
            UserError: for another word.
        """
        asked, where = word, "progress"
        if word == "auto":
            asked, where = environment.get(VARIABLE) or "auto", VARIABLE
        if asked == "auto":
            return cls.BARS if terminal else cls.PLAIN
        words = [mode.value for mode in cls]
        if asked not in words:
            raise UserError(f"{where}={asked}: expected auto, {', '.join(words)}")
        return cls(asked)


class Interrupted(Exception):
    """The user (or the system) asked to stop; raised between two pieces of work."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Stage:
    """Counts the work of one stage; silent by itself."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def advance(self, amount: int = 1) -> None:
        """Count ``amount`` pieces as done.

        Raises:
            Interrupted: if a stop was asked for meanwhile.
        """
        self._reporter.check()


class _RichStage(Stage):
    def __init__(self, reporter: Reporter, progress: Progress, task: Any) -> None:
        super().__init__(reporter)
        self._progress, self._task = progress, task

    def advance(self, amount: int = 1) -> None:
        self._progress.advance(self._task, amount)
        super().advance(amount)


class _PlainStage(Stage):
    """A line now and then, with the time left at the pace so far."""

    def __init__(
        self, reporter: Reporter, name: str, total: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(reporter)
        self._name, self._total, self._clock = name, total, clock
        self._done, self._first = 0, 0
        self._begun = self._said = clock()

    def advance(self, amount: int = 1) -> None:
        if self._done == 0:
            # What a resumed search had done before says nothing about the pace.
            self._first, self._begun = amount, self._clock()
        self._done += amount
        now = self._clock()
        if now - self._said >= PLAIN_EVERY and self._first < self._done <= self._total:
            self._said = now
            left = (now - self._begun) / (self._done - self._first) * (self._total - self._done)
            self._reporter.say(f"{self._name} {self._done}/{self._total}, {as_clock(left)} left")
        super().advance(amount)


def as_clock(seconds: float) -> str:
    """``1:05`` or ``2:00:09``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Reporter:
    """Silent progress; the one to use from Python."""

    def __init__(self) -> None:
        self.stop_signal: int | None = None

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        """A stage of ``total`` pieces of work."""
        yield Stage(self)

    def say(self, text: str) -> None:
        """A line for the user."""

    def restore_terminal(self) -> None:
        """Leave the terminal as it was before any bars."""

    def check(self) -> None:
        """Raise :class:`Interrupted` if a stop was asked for."""
        if self.stop_signal is not None:
            raise Interrupted(self.stop_signal)

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into a stop at the next safe point; a second one stops at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self.stop_signal is not None:
                # An exception could be caught on its way; what is on the disk is whole at any time.
                self.restore_terminal()
                os._exit(128 + number)
            self.stop_signal = number
            self.say("stopping at the next safe point (once more: at once) ...")

        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class ConsoleReporter(Reporter):
    """Rich bars with time left on a terminal, lines elsewhere.

    Args:
        console: by default that of standard error.
        progress: as in the configuration, see :meth:`Progressing.chosen`.
    """

    def __init__(self, console: Console | None = None, progress: str = "auto") -> None:
        super().__init__()
        self.console = console or Console(file=sys.stderr)
        self.progressing = Progressing.chosen(progress, self.console.is_terminal)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        """See :meth:`Reporter.stage`."""
        if self.progressing is not Progressing.BARS:
            self.say(f"{name} ...")
            yield _PlainStage(self, name, total)
            return
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            yield _RichStage(self, progress, progress.add_task(name, total=total))

    def say(self, text: str) -> None:
        """See :meth:`Reporter.say`."""
        if self.progressing is not Progressing.QUIET:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def restore_terminal(self) -> None:
        """See :meth:`Reporter.restore_terminal`."""
        self.console.show_cursor(True)

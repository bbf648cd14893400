"""What the user sees while something runs, and where a running stage may be stopped."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Rich bars with time left on a terminal, one line a stage elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console(file=sys.stderr)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Stage]:
        """See :meth:`Reporter.stage`."""
        if not self.console.is_terminal:
            self.say(f"{name} ...")
            yield Stage(self)
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
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def restore_terminal(self) -> None:
        """See :meth:`Reporter.restore_terminal`."""
        self.console.show_cursor(True)

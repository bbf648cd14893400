"""How long the stages of a search take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by stage; a stage that comes again adds to its own."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Count what happens inside for ``stage``."""
        started = time.perf_counter()
        yield
        taken = time.perf_counter() - started
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + taken, 3)

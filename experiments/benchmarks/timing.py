"""Comparing durations on a machine that is never quite alone: interleaved, paired, medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """How much longer one thing takes than another, from rounds in which both ran.

    Attributes:
        median: of the ratios of all rounds.
        low, high: their quartiles.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float], reference: Sequence[float]) -> Ratio:
        """From durations of the same rounds: what slows a whole round down cancels."""
        ratios = np.asarray(seconds) / np.asarray(reference)
        low, median, high = np.percentile(ratios, (25, 50, 75))
        return cls(float(median), float(low), float(high))


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds of the processor on a single thread, which nobody else's work adds to; else of the wall."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def timed(work: Work, device: torch.device) -> float:
    """Seconds that ``work`` takes, with all that it left running on the device."""
    now = clock(device)
    _finish(device)
    started = now()
    work()
    _finish(device)
    return now() - started


def interleave(
    works: Mapping[str, Work], rounds: int, device: torch.device, least_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Durations of all ``works``, each of which runs once a round.

    Every round begins with another one, so that none always follows the same.

    Args:
        works: what to run; warmed up before.
        rounds: at least.
        device: where they run.
        least_seconds: short works have more rounds, up to ten times as many, until this has passed.
    """
    names, found = list(works), {name: list[float]() for name in works}
    started, done = time.perf_counter(), 0
    while done < rounds or (done < 10 * rounds and time.perf_counter() - started < least_seconds):
        first = done % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(timed(works[name], device))
        done += 1
    return found


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

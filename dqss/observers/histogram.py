"""A streaming histogram of bounded memory that does not depend on how the stream was cut."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from dqss.errors import DataError, NonFiniteError
from dqss.observers import loops
from dqss.observers.base import BatchExtremes, Statistics, power_of_two

_CHUNK = 1 << 18  # values binned at a time: small enough for the cache
_BATCHES = 1024  # after so many an average has forgotten; bounds the memory
_RESOLUTION = 24  # bin numbers up to 2^24 are exact in fp32


class HistogramAccumulator:
    """Counts of C channels, one histogram of ``bins`` bins for each.

    Bins have a width ``w`` that is a power of two, and edges at its multiples; ``w`` is the
    smallest power of two with which the range seen so far fits into the window of ``bins`` bins.
    When the range grows, ``w`` doubles and neighbouring pairs of bins merge: no count is lost or
    guessed, and the state is a function of the set of values alone, whatever the order and the
    batches they came in. Between half and all of the bins are in use. Exact zeros are counted
    apart (a ReLU puts half of the values there, and every grid represents them exactly).
    Counts are integers, so that results are the same from run to run on CPU and GPU.

    Args:
        channels: C.
        bins: of each channel.
        keep_batches: keep the extremes of each batch too, of the last 1024 at most; they alone
            depend on how the stream was cut.
    """

    def __init__(self, channels: int, bins: int = 2048, keep_batches: bool = False) -> None:
        if channels < 1 or bins < 2:
            raise ValueError(f"channels={channels}, bins={bins}: expected at least 1 channel and 2 bins")
        self.channels, self.bins = channels, bins
        self._seen = 0
        self._batches: deque[tuple[Tensor, Tensor]] | None = deque(maxlen=_BATCHES) if keep_batches else None
        self._importance: Tensor | None = None
        self._counts = torch.zeros((channels, bins + loops.LANES), dtype=torch.int64)  # zeros at the end
        self._offset = torch.arange(channels, dtype=torch.int32) * (bins + loops.LANES)
        self._minimum = torch.full((channels,), torch.inf)
        self._maximum = torch.full((channels,), -torch.inf)
        self._width = power_of_two(torch.full((channels,), -126))
        self._start = torch.zeros(channels)

    @property
    def count(self) -> int:
        """Number of values seen in each channel."""
        return self._seen

    def update(self, rows: Tensor) -> None:
        """Add a batch of values, ``[C, n]``. The state lives on the device of the first batch.

        Raises:
            NonFiniteError: when a value is NaN or infinite as fp32; the state is then unchanged.
        """
        rows = self._checked(rows)
        if self._importance is not None:
            raise ValueError("weigh() comes after the last update(): bins may not move any more")
        if rows.shape[1] == 0:
            return
        if self._seen == 0:
            self._to(rows.device)
        before = self._state()
        columns = max(1, max(_CHUNK, self._counts.numel()) // self.channels)
        # A row of its own has no stride that a compiled loop would have to know.
        chunks = torch.split(rows.reshape(-1) if self.channels == 1 else rows, columns, dim=-1)
        try:
            found = [self._add(chunk.view(self.channels, -1)) for chunk in chunks]
        except _NotFiniteError:
            self._load(before)
            nan, inf = int(torch.isnan(rows).sum()), int(torch.isinf(rows).sum())
            raise NonFiniteError(f"{nan} NaN and {inf} infinite among {rows.numel()} values") from None
        if self._batches is not None:
            lows, highs = (torch.stack(parts) for parts in zip(*found, strict=True))
            self._batches.append((lows.amin(dim=0), highs.amax(dim=0)))
        self._seen += rows.shape[1]

    def weigh(self, rows: Tensor, importance: Tensor) -> None:
        """Add importance (see :class:`Statistics`) to values that were seen before.

        Sums of floating numbers are made on the CPU, where they do not change from run to run.

        Args:
            rows: ``[C, n]``; what lies outside the range seen counts at its end.
            importance: ``[C, n]``, not negative.
        """
        rows = self._checked(rows).cpu()
        if self._importance is None:
            self._importance = torch.zeros((self.channels, self.bins + 1), dtype=torch.float64)
        width, start = self._width.cpu()[:, None], self._start.cpu()[:, None]
        position = torch.floor(rows / width).sub_(start).clamp_(0, self.bins - 1).long()
        position[rows == 0] = self.bins  # apart, as their counts are
        self._importance.scatter_add_(1, position, importance.detach().to("cpu", torch.float64))

    def statistics(self) -> Statistics:
        """What was seen so far: bin centres, clamped to the range seen, and the exact zeros.

        Raises:
            DataError: when nothing was seen yet.
        """
        if self._seen == 0:
            raise DataError("no values to calibrate with: give at least one input that is not empty")
        number = self._start[:, None] + torch.arange(self.bins, device=self._start.device)
        counts, zeros = self._counts[:, : self.bins], self._counts[:, self.bins :].sum(dim=1, keepdim=True)
        centres = (number + 0.5) * self._width[:, None]
        values = torch.cat([centres, torch.zeros_like(centres[:, :1])], dim=1)
        values = torch.clamp(values, self._minimum[:, None], self._maximum[:, None])
        values, order = values.sort(dim=1, stable=True)
        counts = torch.cat([counts, zeros], dim=1).gather(1, order)
        importance = None if self._importance is None else self._importance.to(order.device).gather(1, order)
        return Statistics(
            values,
            counts.to(torch.float32),
            self._minimum.clone(),
            self._maximum.clone(),
            self._width.clone(),
            importance,
            None if self._batches is None else self._batch_extremes(),
        )

    def _batch_extremes(self) -> BatchExtremes:
        minima, maxima = zip(*(self._batches or ()), strict=True)
        return BatchExtremes(torch.stack(minima), torch.stack(maxima))

    def _checked(self, rows: Tensor) -> Tensor:
        if rows.ndim != 2 or rows.shape[0] != self.channels:
            raise ValueError(f"rows of shape {tuple(rows.shape)}: expected ({self.channels}, n)")
        return rows.detach().to(torch.float32)

    def _to(self, device: torch.device) -> None:
        self._offset = self._offset.to(device)
        self._load([part.to(device) for part in self._state()])

    def _state(self) -> list[Tensor]:
        """What an update changes; tensors are replaced, never written into."""
        return [self._counts, self._minimum, self._maximum, self._width, self._start]

    def _load(self, state: list[Tensor]) -> None:
        self._counts, self._minimum, self._maximum, self._width, self._start = state

    def _add(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """Count ``[C, n]``; the extremes of each row."""
        place, low, high = self._place(chunk)
        minimum, maximum = torch.minimum(self._minimum, low), torch.maximum(self._maximum, high)
        if not (torch.equal(minimum, self._minimum) and torch.equal(maximum, self._maximum)):
            if not bool((torch.isfinite(minimum) & torch.isfinite(maximum)).all()):
                raise _NotFiniteError
            if self._cover(minimum, maximum):
                place, _, _ = self._place(chunk)
        counted = torch.bincount(place.reshape(-1), minlength=self._counts.numel())
        self._counts = self._counts + counted.view_as(self._counts)
        return low, high

    def _place(self, chunk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        zeros = self._offset + self.bins
        place, low, high = loops.place(
            chunk.numel(), chunk, 1 / self._width, self._start, self._offset, zeros
        )
        return place, low, high

    def _cover(self, minimum: Tensor, maximum: Tensor) -> bool:
        """Widen the windows to ``[minimum, maximum]`` by merging pairs of bins, and shift them.

        Returns:
            Whether any bin has moved.
        """
        self._minimum, self._maximum = minimum, maximum
        width = _fitting_width(minimum, maximum, self.bins)
        start = torch.floor(minimum / width)
        if torch.equal(width, self._width) and torch.equal(start, self._start):
            return False
        doublings = torch.frexp(width).exponent - torch.frexp(self._width).exponent
        number = self._start[:, None].long() + torch.arange(self.bins, device=start.device)
        # An arithmetic shift is a floor; by 62 every bin number has become 0 or -1 already.
        number = number >> doublings.long().clamp(max=62)[:, None]
        position = (number - start[:, None].long()).clamp(0, self.bins - 1)  # empty bins may fall outside
        zeros = self._counts[:, self.bins :]
        merged = torch.zeros_like(self._counts[:, : self.bins])
        merged.scatter_add_(1, position, self._counts[:, : self.bins])
        self._counts = torch.cat([merged, zeros], dim=1)
        self._width, self._start = width, start
        return True


class _NotFiniteError(Exception):
    """A value is NaN or infinite."""


def _fitting_width(minimum: Tensor, maximum: Tensor, bins: int) -> Tensor:
    """Smallest power of two ``w`` with ``floor(maximum / w) - floor(minimum / w) < bins``.

    Not below the resolution of fp32 at the largest magnitude, where bins would be empty.
    """
    largest = torch.maximum(minimum.abs(), maximum.abs())
    finest = torch.where(largest > 0, torch.frexp(largest).exponent - _RESOLUTION, -126)
    needed = torch.frexp((maximum / 2 - minimum / 2) / (bins / 2)).exponent
    exponent = torch.maximum(finest, torch.where(maximum > minimum, needed - 2, -126))
    exponent = exponent.clamp(min=-126)
    for _ in range(3):
        width = power_of_two(exponent)
        fits = torch.floor(maximum / width) - torch.floor(minimum / width) < bins
        exponent = torch.where(fits, exponent, exponent + 1)
    return power_of_two(exponent)

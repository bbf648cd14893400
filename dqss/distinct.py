"""Candidates that come to the same are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distinct:
    """Which of K candidates are one and the same: U rows stand for them all.

    Attributes:
        first: the first candidate of each row, ascending.
        rows: for each candidate the row that stands for it.
        index: the same as a tensor, ``[K]`` int64.
    """

    first: tuple[int, ...]
    rows: tuple[int, ...]
    index: Tensor

    @classmethod
    def of(cls, alike: Sequence[int], device: torch.device) -> Distinct:
        """From, for each candidate, the first one that it is alike (itself if there is none)."""
        first = tuple(dict.fromkeys(alike))
        rows = tuple(first.index(k) for k in alike)
        return cls(first, rows, torch.tensor(rows, device=device))

    @cached_property
    def all_differ(self) -> bool:
        """Whether no two are the same."""
        return len(self.first) == len(self.rows)

    def pool(self, weights: Tensor) -> Tensor:
        """Weights ``[U]`` of the rows from those of the candidates, ``[K]``."""
        return (
            weights
            if self.all_differ
            else weights.new_zeros(len(self.first)).index_add(0, self.index, weights)
        )

    def share(self, sums: Tensor) -> Tensor:
        """What was found of the rows, ``[U]``, for each candidate, ``[K]``."""
        return sums if self.all_differ else sums.index_select(0, self.index)

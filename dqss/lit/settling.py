"""Decisions that have settled: frozen to their choice, they cost no more than a discrete layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dqss.decision import Decision, Frozen, margins, outcome_probabilities
from dqss.errors import UserError


@dataclass(frozen=True)
class Settling:
    """When a decision counts as settled. From then on it is frozen.

    A frozen decision uses its choice alone: no mixture on the way forward, no sums over candidates
    and no gradient of the weight on the way back. Its logits stay as they are until the search
    ends, so that the argmax and the probability that is reported are those of the moment. It stays
    frozen when the entropy rises again; the refinement after the search may still change it.

    Attributes:
        margin: probability of its best outcome minus that of the second best, in 0..1 ...; None:
            nothing is ever frozen.
        patience: ... which must have been reached after so many steps in a row, with the same choice.
    """

    margin: float | None = None
    patience: int = 50

    def __post_init__(self) -> None:
        if self.margin is not None and not 0 < self.margin <= 1:
            raise UserError(f"method.settle.margin={self.margin}: expected a number in 0..1, above 0")
        if not self.patience >= 1:
            raise UserError(f"method.settle.patience={self.patience}: expected 1 or more")


class Settled:
    """Watches decisions and freezes those that have settled.

    Args:
        decisions: all of a search.
        settling: when they have.
    """

    def __init__(self, decisions: Sequence[Decision], settling: Settling) -> None:
        self.settling = settling
        self._decisions = list(decisions)
        self._certain: dict[str, tuple[int, int]] = {}
        """By name, the choice of a decision that has its margin, and for how many steps it has had it."""

    @property
    def frozen(self) -> dict[str, int]:
        """The choice of every decision that has settled, by its name."""
        return {n: choice for n, (choice, steps) in self._certain.items() if steps >= self.settling.patience}

    @torch.no_grad()
    def observe(self) -> None:
        """Look at all decisions once: after each step, when the logits have moved."""
        margin = self.settling.margin
        if margin is None:
            return
        frozen = self.frozen
        by_size: dict[int, list[Decision]] = {}
        for decision in self._decisions:
            if decision.name not in frozen:
                by_size.setdefault(len(decision.options), []).append(decision)
        for group in by_size.values():
            reached = margins(outcome_probabilities(group)) >= margin
            for decision, certain in zip(group, reached.tolist(), strict=True):
                self._count(decision, certain)

    def _count(self, decision: Decision, certain: bool) -> None:
        if not certain:
            self._certain.pop(decision.name, None)
            return
        choice, (before, steps) = decision.choice, self._certain.get(decision.name, (-1, 0))
        self._certain[decision.name] = choice, steps + 1 if choice == before else 1

    def freeze(self) -> None:
        """Put in place what is frozen; to be called after all decisions have been relaxed alike."""
        frozen = self.frozen
        for decision in self._decisions:
            if decision.name in frozen:
                decision.relaxation = Frozen(frozen[decision.name])

    def state_dict(self) -> dict[str, list[int]]:
        """All that :meth:`load_state_dict` needs, in plain containers."""
        return {name: list(found) for name, found in self._certain.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[int]]) -> None:
        """Undo :meth:`state_dict`."""
        self._certain = {name: (choice, steps) for name, (choice, steps) in state.items()}

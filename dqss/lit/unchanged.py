"""Stopping early: when the strategy that the logits prefer has stopped changing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dqss.decision import Decision, entropies, outcome_probabilities

CERTAIN = 0.3
"""Share of its largest value that the mean entropy of the decisions must have fallen to."""


class Unchanged:
    """Counts the steps since the argmax last changed.

    While the entropy is high, the argmax is the best option of each decision among others that are
    drawn nearly at random, and says little of those among others that are chosen. So a step
    counts only where the mean entropy is at most :data:`CERTAIN` of what it could be; above that the
    count begins anew. A schedule whose entropy falls late cannot stop before it has fallen, one that
    goes on to reheat from no more than that is stopped if reheating changes nothing, and one whose
    entropy never falls runs all its steps.

    Args:
        decisions: all of a search.
        patience: steps without a change after which the search is done; None looks at nothing.
    """

    def __init__(self, decisions: Sequence[Decision], patience: int | None) -> None:
        self.patience = patience
        self.steps = 0
        self._decisions = list(decisions)
        self._choices: dict[str, int] = {}

    @property
    def done(self) -> bool:
        """Whether the search may stop."""
        return self.patience is not None and self.steps >= self.patience

    @torch.no_grad()
    def observe(self) -> None:
        """Look at all decisions once: after each step, when the logits have moved."""
        if self.patience is None:
            return
        choices = {decision.name: decision.choice for decision in self._decisions}
        unchanged = choices == self._choices and self._entropy() <= CERTAIN
        self.steps, self._choices = self.steps + 1 if unchanged else 0, choices

    def _entropy(self) -> float:
        """Mean over the decisions, as a share of its largest value; 0 where there is nothing to choose."""
        most = sum(math.log(decision.outcomes) for decision in self._decisions)
        return float(entropies(outcome_probabilities(self._decisions)).sum()) / most if most else 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs, in plain containers."""
        return {"steps": self.steps, "choices": dict(self._choices)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.steps, self._choices = int(state["steps"]), dict(state["choices"])

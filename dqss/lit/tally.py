"""What is known of decisions, those that are alike together: one tensor, whatever their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dqss.decision import Decision, alike


class Tally:
    """Samples of D decisions with K options and C outcomes each.

    Attributes:
        decisions: the D.
        outcomes: C.
        outcome: ``[D, K]`` int64, the outcome of each option.
        sums: ``[D, K, K]``, as for :func:`dqss.effects.potentials`.
        counts: ``[D, K]``, the weight of the samples with each option in place.
        steps: ``[D]``, how many there were.
        rows: for each decision its part of these, in the same memory; what an optimizer keeps of it.
    """

    def __init__(self, decisions: Sequence[Decision]) -> None:
        self.decisions = list(decisions)
        self.outcomes = self.decisions[0].outcomes
        self.outcome = torch.stack([decision.outcome for decision in self.decisions])
        logits = self.decisions[0].logits.detach()
        count, k = len(self.decisions), len(logits)
        # In the type of the logits: torch gives any other back in that one on loading.
        self._set(logits.new_zeros(count, k, k), logits.new_zeros(count, k), torch.zeros(count))

    def _set(self, sums: Tensor, counts: Tensor, steps: Tensor) -> None:
        self.sums, self.counts, self.steps = sums, counts, steps
        rows = zip(sums, counts, steps, strict=True)
        self.rows = [dict(zip(("sums", "counts", "step"), row, strict=True)) for row in rows]

    def holds(self, states: Sequence[Mapping[str, Tensor]]) -> bool:
        """Whether the states of the decisions are :attr:`rows`."""
        return all(own["sums"] is state["sums"] for own, state in zip(self.rows, states, strict=True))

    def take(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on from states that were loaded, or moved elsewhere."""
        sums, counts, steps = (
            torch.stack([state[key] for state in states]) for key in ("sums", "counts", "step")
        )
        self.outcome = self.outcome.to(sums.device)
        self._set(sums, counts, steps)

    def forget(self, memory: float) -> None:
        """Let all that is known fade by a factor, but of decisions that are frozen."""
        frozen = [decision.frozen for decision in self.decisions]
        if not any(frozen):
            self.sums *= memory
            self.counts *= memory
            return
        factors = torch.tensor([1.0 if each else memory for each in frozen]).to(self.sums)
        self.sums *= factors[:, None, None]
        self.counts *= factors[:, None]

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add a sample of each decision that has a gradient ``[K]``, with its option in place."""
        found = [(n, gradient) for n, gradient in enumerate(gradients) if gradient is not None]
        if not found:
            return
        where = [(n, self._place(n)) for n, _ in found]
        rows, places = torch.tensor(where).to(self.sums.device).T
        several = torch.stack([gradient for _, gradient in found]).to(self.sums)
        differences = several - several.gather(1, places[:, None])
        self.sums.index_put_((rows, places), differences, accumulate=True)
        self.counts.index_put_((rows, places), self.counts.new_ones(()), accumulate=True)

    def _place(self, number: int) -> int:
        place = self.decisions[number].place()
        assert place is not None
        return place


def tallies(decisions: Sequence[Decision]) -> list[Tally]:
    """Tallies of all decisions, empty."""
    return [Tally(group) for group in alike(decisions)]

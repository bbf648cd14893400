"""How limits bear on a search: what an option costs is added to what it does to the loss.

The search minimizes ``E[loss]`` over probabilities whose expected costs keep the limits. Its
Lagrangian adds ``sum_l lambda_l (E[cost_l] / limit_l - 1)``, so that the effect of an option becomes
``v_k + sum_l lambda_l price_lk``. The multipliers follow by dual ascent in their logarithm: dearer
while the expected cost is above its limit, cheaper while it is below. Schedules that move logits by
a gradient get an augmented Lagrangian in their loss instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dqss.budget.limits import Limits
from dqss.decision import Decision
from dqss.sensitivity import Estimates

BEGIN, LEAST, MOST = 0.1, 1e-6, 10.0
"""Multipliers, in units of what is at stake: first, smallest, largest. With the largest, prices
decide; while the entropy is high no price could keep a limit, and must come down again soon."""
GAIN = 0.5
"""Of the ascent, each step, where logits follow at once."""
STIFFNESS, SLOW_GAIN = 10.0, 0.02
"""Where an optimizer moves the logits slowly: the quadratic term that damps, and the gain beside it."""
MEASURED, LIKELY = "measured effects", "minus log probability"


class Steering:
    """Multipliers of limits, and the scores of options without them.

    Args:
        decisions: all of a supernet.
        limits: on their assignments.
        estimates: of the effect of each option, from before the search; None: there are none.
    """

    def __init__(
        self, decisions: Sequence[Decision], limits: Limits, estimates: Estimates | None = None
    ) -> None:
        self.decisions, self.limits = list(decisions), limits
        self.estimates = estimates
        self.multipliers = torch.full((len(limits.limits),), BEGIN, dtype=torch.float64)
        self.effects: dict[str, Tensor] = {}

    @torch.no_grad()
    def priced(self, groups: Sequence[Sequence[Decision]], effects: Sequence[Tensor]) -> list[Tensor]:
        """Effects of outcomes with what their options cost, at the present probabilities.

        Args:
            groups: decisions with equally many outcomes each.
            effects: ``[D, C]`` for each group, in units of the loss.
        """
        for group, rows in zip(groups, effects, strict=True):
            known = rows.detach().cpu()
            self.effects |= {d.name: v[d.outcome.cpu()] for d, v in zip(group, known, strict=True)}
        stake = sum(float((rows.amax(-1) - rows.amin(-1)).sum()) for rows in effects)
        found = self._prices(stake)
        return [
            rows + torch.stack([_by_outcome(decision, found) for decision in group]).to(rows)
            for group, rows in zip(groups, effects, strict=True)
        ]

    @torch.no_grad()
    def adapt(self) -> None:
        """Raise the multipliers of what is too dear in expectation, lower the others."""
        excess = torch.stack(self.limits.excess(self._probabilities()))
        self.multipliers = (self.multipliers * torch.exp(GAIN * excess.clamp(-1, 1))).clamp(LEAST, MOST)

    def penalty(self, loss: Tensor) -> Tensor:
        """What is added to a loss that moves the logits by its gradient; then the multipliers adapt.

        The augmented Lagrangian of ``excess <= 0`` (Hestenes and Powell; Rockafellar 1973):
        ``((m + r excess)_+^2 - m^2) / 2r``, in units of the loss.
        """
        excess = torch.stack(self.limits.excess(self._probabilities()))
        push = (self.multipliers + STIFFNESS * excess).clamp(min=0)
        found = float(loss.detach().abs()) * (push.square() - self.multipliers.square()).sum()
        step = SLOW_GAIN * STIFFNESS * excess.detach().clamp(-1, 1)
        self.multipliers = (self.multipliers + step).clamp(0, MOST)
        return (found / (2 * STIFFNESS)).to(loss)

    def scores(self) -> dict[str, Tensor]:
        """How bad each option is, ``[K]`` a decision: by its effect where that was measured."""
        if self.effects:
            return self.effects
        return {d.name: -torch.tensor(d.probabilities()).double().log() for d in self.decisions}

    @property
    def kind(self) -> str:
        """What the scores are."""
        return MEASURED if self.effects else LIKELY

    def choose(self) -> dict[str, int]:
        """The assignment with the best scores that keeps all limits."""
        return self.limits.solve(self.scores())

    def begin(self) -> list[dict[str, int]]:
        """The best assignments that keep all limits as far as the estimates know, where there are any.

        The less of them is chance in the inputs at hand the earlier they come: first that without slopes by a
        softer distance, of which a few inputs hold less, last the one with slopes (``experiments/budgets``).
        """
        if self.estimates is None:
            return []
        found = [*self.estimates.alone[::-1], self.estimates.effects]
        return [self.limits.solve(each) for each in found]

    def record(self, assignment: Mapping[str, int]) -> dict[str, Any]:
        """What a strategy says about its budget: the limits, what it costs, and how it was chosen."""
        return {
            "limits": {limit.cost.name: limit.most for limit in self.limits.limits},
            "achieved": self.limits.achieved(assignment),
            "scores": self.kind,
        }

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "multipliers": self.multipliers,
            "effects": dict(self.effects),
            "estimates": None if self.estimates is None else dataclasses.asdict(self.estimates),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.multipliers, self.effects = state["multipliers"], dict(state["effects"])
        self.estimates = None if state["estimates"] is None else Estimates(**state["estimates"])

    def _prices(self, stake: float) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        by_limit = self.limits.prices(self._probabilities())
        for multiplier, prices in zip(self.multipliers, by_limit, strict=True):
            for name, price in prices.items():
                part = stake * multiplier * price
                found[name] = found[name] + part if name in found else part
        return found

    def _probabilities(self) -> dict[str, Tensor]:
        # All at once: each copy from a GPU would wait.
        sizes = [len(decision.options) for decision in self.decisions]
        own = [d.logits.detach() if d.frozen else d.logits for d in self.decisions]
        logits = torch.split(torch.cat(own).double().cpu(), sizes)
        names = (decision.name for decision in self.decisions)
        return {name: torch.softmax(each, 0) for name, each in zip(names, logits, strict=True)}


def _by_outcome(decision: Decision, prices: dict[str, Tensor]) -> Tensor:
    """The mean price of the options that lead to each outcome, ``[C]``."""
    price = prices.get(decision.name)
    if price is None:
        return torch.zeros(decision.outcomes, dtype=torch.float64)
    return decision.mean_by_outcome(price)

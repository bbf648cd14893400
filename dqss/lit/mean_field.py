"""An optimizer that sets logits to the learned effects of their options, at a falling entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from dqss.budget.steer import Steering
from dqss.decision import Decision, set_outcomes
from dqss.effects import logits_of_entropy, pool, potentials
from dqss.errors import NonFiniteError

ESTIMATED = 20.0
"""Samples of each option that an estimate from before the search is worth."""
SETTLING = 100
"""Times that prices and probabilities follow one another before the first step."""
SHOWN = 1.0
"""Weight of what uniform strategies have shown of an option, in samples of it."""


class MeanField(Optimizer):
    """Mean-field annealing of decisions that are :class:`dqss.decision.Sampled`.

    After each backward pass the differences between the option in place and all others join a
    running average; the potentials ``v`` of :mod:`dqss.effects` follow from it, and every logit
    becomes ``-v / T``. The one temperature T of all decisions is what gives the mean entropy that
    is wanted at this step: choices that matter much settle early, the others meanwhile go on being
    sampled. Decisions whose options all come to the same are left out of that mean. This is the
    stationary point of ``E[loss] - T entropy`` over independent decisions.
    There is no learning rate, and the scale of the loss does not matter.

    What is known of a frozen decision (see :class:`dqss.decision.Frozen`) stays as it is, and so do
    its logits. It still counts for the temperature, with the effects last known: the others are
    neither hotter nor colder because of it, and follow the path that they would follow anyway.

    With a budget, what an option costs is added to its effect, see :mod:`dqss.budget.steer`. Effects that
    were estimated before the search count like so many samples of every option that are never forgotten:
    where widths differ, most options are drawn far too rarely to tell a hundredth of what is at stake.
    What the estimates say of the noise that an option adds of its own is added to every sample, which
    leaves it out: no option need be seen from both sides then.

    Args:
        decisions: whose logits to set.
        entropy: share of ``log K`` that is wanted after each step, as a function of the number of
            steps done.
        memory: factor on all that is known, each step; forgets the samples of early
            probabilities.
        steering: towards the limits of a budget; None: there is none.
        shown: effects of options ``[K]`` by decision that are known from the start, as if each had been
            sampled once; NaN where nothing is known. None: nothing is known of any.
    """

    def __init__(
        self,
        decisions: Sequence[Decision],
        entropy: Callable[[int], float],
        memory: float = 0.99,
        steering: Steering | None = None,
        shown: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__([decision.logits for decision in decisions], {"memory": memory})
        self.decisions = list(decisions)
        self.entropy = entropy
        self._estimates = None if steering is None else steering.estimates
        self._potentials: list[tuple[list[Decision], Tensor]] = []
        self.steering = steering
        for logits in self._logits():
            # Of their final shape from the start, so that checkpoints always fit.
            k = len(logits)
            # In the type of the logits: torch gives any other back in that one on loading.
            self.state[logits]["sums"] = logits.new_zeros(k, k, requires_grad=False)
            self.state[logits]["counts"] = logits.new_zeros(k, requires_grad=False)
            self.state[logits]["step"] = torch.tensor(0.0)
        if shown:
            self._begin(shown)

    def _logits(self) -> list[Tensor]:
        return [decision.logits for decision in self.decisions]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Learn from the gradients of one sample and set all logits."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._learn()
        self._place()
        if self.steering is not None:
            self.steering.adapt()
        return loss

    @torch.no_grad()
    def _begin(self, shown: Mapping[str, Tensor]) -> None:
        """Know of all options what was shown of them, and set the logits by that."""
        for decision in self.decisions:
            if decision.name in shown:
                effect = shown[decision.name].to(decision.logits)
                state, known = self.state[decision.logits], ~torch.isnan(effect)
                # What is seen from both sides alike is what it is said to be.
                difference = torch.nan_to_num(effect[None, :] - effect[:, None])
                state["sums"] += SHOWN * difference
                state["counts"] += SHOWN * known
        self._place()

    def _place(self) -> None:
        """Set all logits by what is known, at the entropy that is wanted now."""
        groups = _alike(self.decisions)
        found = [potentials(*self._known(group)) for group in groups]
        self._potentials = list(zip(groups, found, strict=True))
        if self.steering is not None:
            found = self.steering.priced(groups, found)
        done = int(self.state[self.decisions[0].logits]["step"])
        for group, rows in zip(groups, logits_of_entropy(found, self.entropy(done)), strict=True):
            live = [k for k, decision in enumerate(group) if not decision.frozen]
            if live:
                set_outcomes([group[k] for k in live], rows[live])

    def _learn(self) -> None:
        torch._foreach_add_([self.state[logits]["step"] for logits in self._logits()], 1)
        learning = [self.state[d.logits] for d in self.decisions if not d.frozen]
        if learning:  # torch refuses an empty list
            for key in ("sums", "counts"):
                torch._foreach_mul_([state[key] for state in learning], self.param_groups[0]["memory"])
        found = [(d, d.logits.grad) for d in self.decisions if d.logits.grad is not None]
        # One look at all of them: each look at one would wait for the device.
        if found and not bool(torch.isfinite(torch.cat([gradient for _, gradient in found])).all()):
            self._refuse(found)
        for decision, gradient in found:
            place = decision.place()
            assert place is not None
            self.state[decision.logits]["sums"][place] += gradient - gradient[place]
            self.state[decision.logits]["counts"][place] += 1

    def _refuse(self, found: Sequence[tuple[Decision, Tensor]]) -> NoReturn:
        """It would stay in the sums for good, and every choice would be left to chance."""
        bad = next(decision for decision, gradient in found if not bool(torch.isfinite(gradient).all()))
        step = int(self.state[bad.logits]["step"]) - 1
        raise NonFiniteError(
            f"the gradient of decision {bad.name!r} is NaN or infinite at step {step}: "
            "skip its layer in the search space, or use another loss"
        )

    def _known(self, group: Sequence[Decision]) -> tuple[Tensor, Tensor]:
        """Sums and counts of outcomes: options that are alike are learned of together.

        The decisions have equally many options, and equally many outcomes.
        """
        states = [self.state[decision.logits] for decision in group]
        sums, counts = (torch.stack([state[key] for state in states]) for key in ("sums", "counts"))
        if self._estimates is not None:
            effects, noise = (
                torch.stack([known[decision.name] for decision in group]).to(sums)
                for known in (self._estimates.effects, self._estimates.noise)
            )
            sums = sums + counts[..., None] * noise + ESTIMATED * (effects[:, None, :] - effects[:, :, None])
            counts = counts + ESTIMATED
            # Either side is right by itself: each pair has the mean of all its samples.
            pairs = (sums - sums.mT) / (counts[:, :, None] + counts[:, None, :])
            sums = counts[..., None] * pairs
        if group[0].outcomes == len(group[0].options):
            return sums, counts
        return pool(sums, counts, torch.stack([d.outcome for d in group]), group[0].outcomes)

    def effects(self, decision: Decision) -> Tensor:
        """What is known of a decision's outcomes: ``[C]`` fp64, in units of the loss, of mean zero."""
        return potentials(*self._known([decision]))[0]

    def learned(self) -> dict[str, Tensor]:
        """What the last step knew of every decision: the effect of each option, ``[K]`` fp64, by name.

        As :meth:`effects`, in units of the loss; options that are alike have the same.
        """
        found: dict[str, Tensor] = {}
        for group, rows in self._potentials:
            # Together: each look at one would wait for the device.
            by_option = rows.gather(1, torch.stack([decision.outcome for decision in group])).cpu()
            found |= {decision.name: row for decision, row in zip(group, by_option, strict=True)}
        return found


@torch.no_grad()
def begin_informed(steering: Steering, entropy: float) -> None:
    """Set logits and prices to where estimates of the effects would lead a search at an entropy."""
    assert steering.estimates is not None
    known = steering.estimates.effects
    groups = _alike(steering.decisions)
    effects = [torch.stack([d.mean_by_outcome(known[d.name]) for d in group]) for group in groups]
    for _ in range(SETTLING):
        priced = steering.priced(groups, effects)
        for group, rows in zip(groups, logits_of_entropy(priced, entropy), strict=True):
            set_outcomes(group, rows.to(group[0].logits))
        steering.adapt()


def _alike(decisions: Sequence[Decision]) -> list[list[Decision]]:
    """Decisions with equally many options and outcomes together: each group is one stacked tensor."""
    groups: dict[tuple[int, int], list[Decision]] = {}
    for decision in decisions:
        groups.setdefault((len(decision.options), decision.outcomes), []).append(decision)
    return list(groups.values())

"""An optimizer that sets logits to the learned effects of their options, at a falling entropy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from dqss.budget.steer import Steering
from dqss.decision import Decision, alike, set_outcomes
from dqss.effects import logits_of_entropy, pool, potentials
from dqss.errors import NonFiniteError
from dqss.lit.tally import Tally, tallies

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
        self._tallies = tallies(self.decisions)
        self._keep()
        if shown:
            self._begin(shown)

    def _keep(self) -> None:
        """What is known is the state, of its final shape from the start: checkpoints always fit."""
        for tally in self._tallies:
            for decision, row in zip(tally.decisions, tally.rows, strict=True):
                self.state[decision.logits] = row

    def _gather(self) -> None:
        """Go on from whatever the state is: loading replaces it, and trainers may move it."""
        for tally in self._tallies:
            states = [self.state[decision.logits] for decision in tally.decisions]
            if not tally.holds(states):
                tally.take(states)
        self._keep()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Learn from the gradients of one sample and set all logits."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._gather()
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
        groups = [tally.decisions for tally in self._tallies]
        found = [potentials(*self._known(tally)) for tally in self._tallies]
        self._potentials = list(zip(groups, found, strict=True))
        if self.steering is not None:
            found = self.steering.priced(groups, found)
        done = int(self._tallies[0].steps[0])
        for group, rows in zip(groups, logits_of_entropy(found, self.entropy(done)), strict=True):
            live = [k for k, decision in enumerate(group) if not decision.frozen]
            if live:
                set_outcomes([group[k] for k in live], rows if len(live) == len(group) else rows[live])

    def _learn(self) -> None:
        for tally in self._tallies:
            tally.steps += 1
            tally.forget(self.param_groups[0]["memory"])
        found = [(d, d.logits.grad) for d in self.decisions if d.logits.grad is not None]
        # One look at all of them: each look at one would wait for the device.
        if found and not bool(torch.isfinite(torch.cat([gradient for _, gradient in found])).all()):
            self._refuse(found)
        for tally in self._tallies:
            tally.add([decision.logits.grad for decision in tally.decisions])

    def _refuse(self, found: Sequence[tuple[Decision, Tensor]]) -> NoReturn:
        """It would stay in the sums for good, and every choice would be left to chance."""
        bad = next(decision for decision, gradient in found if not bool(torch.isfinite(gradient).all()))
        step = int(self.state[bad.logits]["step"]) - 1
        raise NonFiniteError(
            f"the gradient of decision {bad.name!r} is NaN or infinite at step {step}: "
            "skip its layer in the search space, or use another loss"
        )

    def _known(self, tally: Tally) -> tuple[Tensor, Tensor]:
        """Sums and counts of outcomes: options that are alike are learned of together."""
        sums, counts = tally.sums, tally.counts
        if self._estimates is not None:
            effects, noise = (
                torch.stack([known[decision.name] for decision in tally.decisions]).to(sums)
                for known in (self._estimates.effects, self._estimates.noise)
            )
            sums = sums + counts[..., None] * noise + ESTIMATED * (effects[:, None, :] - effects[:, :, None])
            counts = counts + ESTIMATED
            # Either side is right by itself: each pair has the mean of all its samples.
            pairs = (sums - sums.mT) / (counts[:, :, None] + counts[:, None, :])
            sums = counts[..., None] * pairs
        if tally.outcomes == tally.counts.shape[1]:
            return sums, counts
        return pool(sums, counts, tally.outcome, tally.outcomes)

    def effects(self, decision: Decision) -> Tensor:
        """What is known of a decision's outcomes: ``[C]`` fp64, in units of the loss, of mean zero."""
        self._gather()
        tally = next(tally for tally in self._tallies if decision in tally.decisions)
        row: Tensor = potentials(*self._known(tally))[tally.decisions.index(decision)]
        return row

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
    groups = alike(steering.decisions)
    effects = [torch.stack([d.mean_by_outcome(known[d.name]) for d in group]) for group in groups]
    for _ in range(SETTLING):
        priced = steering.priced(groups, effects)
        for group, rows in zip(groups, logits_of_entropy(priced, entropy), strict=True):
            set_outcomes(group, rows.to(group[0].logits))
        steering.adapt()

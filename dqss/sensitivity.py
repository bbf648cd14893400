"""What switching any option would do to the distance, to second order, around one assignment.

Option k in place of option a changes the mixture weights by ``d = e_k - e_a``, and the mean distance by

    G'd + d'Fd / 2

where G is its gradient and F the Gauss-Newton matrix, ``F = E[J'HJ]`` with J the derivative of the
output and H the Hessian of the distance there. First order alone takes no notice of the noise that an
option adds of its own, which is nearly all that tells two bits from eight. With random vectors z of
mean zero whose ``E[zz']`` is H (see :meth:`dqss.losses.Distance.curvature_root`), ``d'Fd`` is the mean of
``(s_k - s_a)^2`` with ``s = J'z``: one backward pass gives s of every option of every decision. HAWQ-V2
(arXiv 1911.03852) takes the mean curvature times the squared error in place of ``d'Fd``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dqss.calibration import random_signs
from dqss.decision import Decision
from dqss.losses import Distance
from dqss.shrinkage import shrink

GROUP = 4
"""Inputs that share a backward pass: their vectors are independent, so that the mean of the squared
sums is that of the squares. More inputs at a time are faster, and a noisier mean."""
PASSES = 5
"""Evaluations an input: forward 1, and two ways back of 2 each."""


@dataclass(frozen=True)
class Estimates:
    """Of switches, in units of the distance, fp64 by decision.

    Attributes:
        effects: ``[K]``, of each option in place of the one around which they were made; zero for that.
        noise: ``[K, K]``, the part ``d'Fd / 2`` of a switch from option j to option k, on its own.
        errors: ``[K]``, standard errors of the noise of switches from the one in place.
        distortion: ``[K]``, summed squared differences of the option to the one in place, of the
            weights that a decision is about; absent for others.
    """

    effects: dict[str, Tensor]
    noise: dict[str, Tensor]
    errors: dict[str, Tensor] = field(default_factory=dict)
    distortion: dict[str, Tensor] = field(default_factory=dict)

    def alone(self) -> dict[str, Tensor]:
        """The effects without slopes, ``[K]`` by decision: for switching nearly all decisions at once.

        A slope is the product of an option's error with those of all options in place. Where these are
        switched too it is another one, and an option that was taken for its slope has it no more: the
        more decisions, the more of what the best sum promises is chance. For the same reason costs of
        weights are drawn towards their squared errors (:mod:`dqss.shrinkage`).
        """
        in_place = {name: int(effect.abs().argmin()) for name, effect in self.effects.items()}
        found = {name: noise[in_place[name]] for name, noise in self.noise.items()}
        shrunk = {
            name: shrink(found[name], self.errors[name], each) for name, each in self.distortion.items()
        }
        return found | shrunk


def second_order(
    run: Callable[[Sequence[int]], Any],
    reference: Callable[[Sequence[int]], Tensor],
    distance: Distance,
    decisions: Mapping[str, Decision],
    assignment: Mapping[str, int],
    groups: Iterable[Sequence[int]],
    distortion: Mapping[str, Tensor] | None = None,
) -> Estimates:
    """The estimated effect of switching each decision to each option, while the others stay as they are.

    Args:
        run: the network with ``assignment`` pinned, so that gradients reach the logits.
        reference: the float network's outputs.
        distance: to them.
        decisions: by name.
        assignment: around which.
        groups: indices of inputs, so many at a time.
        distortion: see :class:`Estimates`; None: nothing is drawn towards it.
    """
    slopes = {name: torch.zeros(len(d.options), dtype=torch.float64) for name, d in decisions.items()}
    bends = {name: torch.zeros(len(s), len(s), dtype=torch.float64) for name, s in slopes.items()}
    fourth = {name: torch.zeros_like(slope) for name, slope in slopes.items()}
    generator, count, passes = torch.Generator().manual_seed(0), 0, 0
    _take(decisions)  # what the last step of a search left there
    for group in groups:
        output = distance.read(run(group)).float()
        slope, bend = _gradients(output, reference(group), distance, decisions, generator)
        for name, at in assignment.items():
            slopes[name] += slope[name] - slope[name][at]
            square = (bend[name][:, None] - bend[name]).square()
            bends[name] += square
            fourth[name] += square[at].square()
        count, passes = count + len(group), passes + 1
    noise = {name: bend / 2 / max(count, 1) for name, bend in bends.items()}
    effects = {name: slope / max(count, 1) + noise[name][assignment[name]] for name, slope in slopes.items()}
    errors = {}
    for name, at in assignment.items():
        # Of a sum of independent squares: their number times their variance.
        variance = (fourth[name] - bends[name][at].square() / max(passes, 1)).clamp(min=0)
        errors[name] = variance.sqrt() / 2 / max(count, 1)
    return Estimates(effects, noise, errors, dict(distortion or {}))


def _gradients(
    output: Tensor,
    reference: Tensor,
    distance: Distance,
    decisions: Mapping[str, Decision],
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the summed distance, and of the output along a random vector, by decision."""
    distances = distance.per_sample(output, reference)
    distances.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    slope, signs = _take(decisions), random_signs(output, generator)
    along = distance.curvature_root(output.detach(), signs) * distance.curvature_scale(output) ** 0.5
    output.backward(along)  # type: ignore[no-untyped-call]
    return slope, _take(decisions)


def _take(decisions: Mapping[str, Decision]) -> dict[str, Tensor]:
    """The gradients of all logits, on the CPU; zero where there is none. They are gone then."""
    found = {}
    for name, decision in decisions.items():
        gradient = decision.logits.grad
        found[name] = torch.zeros(len(decision.options)) if gradient is None else gradient.cpu()
        decision.logits.grad = None
    return {name: gradient.double() for name, gradient in found.items()}

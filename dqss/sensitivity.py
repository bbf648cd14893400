"""What switching any option would do to the distance, to second order, around one assignment.

Option k in place of option a changes the mixture weights by ``d = e_k - e_a``, and the mean distance by

    G'd + d'Fd / 2

where G is its gradient and F the Gauss-Newton matrix, ``F = E[J'HJ]`` with J the derivative of the
output and H the Hessian of the distance there. First order alone takes no notice of the noise that an
option adds of its own, which is nearly all that tells two bits from eight. With random vectors z of
mean zero whose ``E[zz']`` is H (see :meth:`dqss.losses.Distance.curvature_root`), ``d'Fd`` is the mean of
``(s_k - s_a)^2`` with ``s = J'z``: one backward pass gives s of every option of every decision. HAWQ-V2
(arXiv 1911.03852) takes the mean curvature times the squared error in place of ``d'Fd``; where an estimate
is to serve for switching nearly all decisions at once, it is drawn towards that (:mod:`dqss.shrinkage`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dqss.calibration import random_signs
from dqss.curvature import Curvature, Pass
from dqss.decision import Decision
from dqss.losses import Distance
from dqss.shrinkage import shrink

GROUP = 4
"""Inputs that share a backward pass: their vectors are independent, so that the mean of the squared
sums is that of the squares. More inputs at a time are faster, and a noisier mean."""
PASSES = 5
"""Evaluations an input: forward 1, and two ways back of 2 each."""
SOFTER_PASSES = 2
"""More of them for a softer distance."""


@dataclass(frozen=True)
class Estimates:
    """Of switches, in units of the distance, fp64 by decision.

    Attributes:
        effects: ``[K]``, of each option in place of the one around which they were made; zero for that.
        noise: ``[K, K]``, the part ``d'Fd / 2`` of a switch from option j to option k, on its own.
        alone: where they were asked for, ``[K]``, the effects without slopes, for switching nearly all
            decisions at once, in place of the float tensors: by the distance and by a softer one, if there is
            one, in units of that.
    """

    effects: dict[str, Tensor]
    noise: dict[str, Tensor]
    alone: tuple[dict[str, Tensor], ...] = ()


def second_order(
    run: Callable[[Sequence[int]], Any],
    reference: Callable[[Sequence[int]], Tensor],
    distance: Distance,
    decisions: Mapping[str, Decision],
    assignment: Mapping[str, int],
    groups: Iterable[Sequence[int]],
    curvature: Curvature | None = None,
    softer: Distance | None = None,
) -> Estimates:
    """The estimated effect of switching each decision to each option, while the others stay as they are.

    A slope is the product of an option's error with those of all options in place. Where these are
    switched too it is another one, and an option that was taken for its slope has it no more: the
    more decisions, the more of what the best sum promises is chance. That is why there are effects without
    slopes too. For the same reason they are drawn towards what the mean curvature of each tensor says.

    Args:
        run: the network with ``assignment`` pinned, so that gradients reach the logits.
        reference: the float network's outputs.
        distance: to them.
        decisions: by name.
        assignment: around which.
        groups: indices of inputs, so many at a time.
        curvature: watches the quantizers (:func:`dqss.curvature.watching`); None: no effects without slopes
            are wanted.
        softer: another distance for these.
    """
    slopes = {name: torch.zeros(len(d.options), dtype=torch.float64) for name, d in decisions.items()}
    bends = {name: torch.zeros(len(s), len(s), dtype=torch.float64) for name, s in slopes.items()}
    bent = [(each, Squares()) for each in (distance, softer) if each is not None]
    last = bent[-1][0]
    generator, count = torch.Generator().manual_seed(0), 0
    _take(decisions)  # what the last step of a search left there
    for group in groups:
        output = distance.read(run(group)).float()
        if curvature is not None:
            curvature.listening = False
        distance.per_sample(output, reference(group)).sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        for name, slope in _take(decisions).items():
            slopes[name] += slope - slope[assignment[name]]
        if curvature is not None:
            curvature.listening = True
        for each, squares in bent:
            signs = random_signs(output, generator)
            along = each.curvature_root(output.detach(), signs) * each.curvature_scale(output) ** 0.5
            output.backward(along, retain_graph=each is not last)  # type: ignore[no-untyped-call]
            bend = _take(decisions)
            if curvature is not None:
                squares.add(bend, curvature.take())
            for name, row in bend.items() if each is distance else ():
                bends[name] += (row[:, None] - row).square()
        count += len(group)
    noise = {name: bend / 2 / max(count, 1) for name, bend in bends.items()}
    effects = {name: slope / max(count, 1) + noise[name][assignment[name]] for name, slope in slopes.items()}
    if curvature is None:
        return Estimates(effects, noise)
    return Estimates(effects, noise, tuple(squares.costs(count, curvature) for _, squares in bent))


class Squares:
    """Sums over passes, by decision: ``(s_k - s)^2``, its square, and squared norms of gradients.

    Here s is that of the tensor in float. What all tensors add of their own is to be as little as can be, and
    next to the option in place that one itself would add nothing.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.norms: dict[str, list[float]] = {}

    def add(self, bend: Mapping[str, Tensor], seen: Mapping[str, Pass]) -> None:
        """One pass: ``s_k``, ``[K]`` by decision, and what :meth:`Curvature.take` gave."""
        for name, one in seen.items():
            square = (bend[name] - one.exact).square()
            self.sums[name] = self.sums.get(name, 0) + square
            self.squares[name] = self.squares.get(name, 0) + square.square()
            before = self.norms.get(name, [0.0] * len(one.norms))
            self.norms[name] = [a + b for a, b in zip(before, one.norms, strict=True)]
        self.passes += 1

    def error(self, name: str, count: int) -> Tensor:
        """``[K]``, the standard error of half the mean over ``count`` inputs."""
        # Of a sum of independent squares the variance is their number times theirs.
        variance = self.squares[name] - self.sums[name].square() / self.passes
        return variance.clamp(min=0).sqrt() / 2 / count

    def costs(self, count: int, curvature: Curvature) -> dict[str, Tensor]:
        """``[K]``, half the mean over ``count`` inputs, drawn towards what the mean curvature says.

        Weights among weights and activations among activations, since errors of the two differ in kind.
        """
        seen = {name: total / 2 / count for name, total in self.sums.items()}
        errors = {name: self.error(name, count) for name in seen}
        priors = curvature.costs({n: [norm / count for norm in each] for n, each in self.norms.items()})
        roles = curvature.roles
        found = dict(seen)
        for role in sorted(set(roles.values())):
            alike = [name for name in seen if roles.get(name) == role]
            found |= shrink(*({name: each[name] for name in alike} for each in (seen, errors, priors)))
        return found


def _take(decisions: Mapping[str, Decision]) -> dict[str, Tensor]:
    """The gradients of all logits, on the CPU; zero where there is none. They are gone then."""
    found = {}
    for name, decision in decisions.items():
        gradient = decision.logits.grad
        found[name] = torch.zeros(len(decision.options)) if gradient is None else gradient.cpu()
        decision.logits.grad = None
    return {name: gradient.double() for name, gradient in found.items()}

"""What switching an option would do to the loss, from gradients at sampled options.

A decision's K options put the errors ``e_1 .. e_K`` into one tensor. To second order the loss with
option k is ``L_k = L_0 + g'e_k + e_k'H e_k / 2``. Where option j is in place, a backward pass gives
``G_jk = dL/dw_k`` for the mixture weight ``w_k`` of *every* option, and

    G_jk - G_jj = (g + H e_j)'(e_k - e_j) = L_k - L_j - (e_k - e_j)'H (e_k - e_j) / 2

which flatters every option but the one in place: it leaves out the noise that the other would add
of its own. Seen from both sides the missing halves cancel (the trapezoidal rule, which is exact
for second-order functions):

    L_k - L_j = [(G_jk - G_jj) - (G_kj - G_kk)] / 2

So options are sampled, the differences are averaged by the option in place, and potentials ``v``
are fitted to the differences of all pairs by weighted least squares. Since the other decisions are
sampled too, ``v_k`` is a mean-field effect: the mean loss with option k, the others being drawn
from their present probabilities.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ONE_SIDED = 0.05
"""Least weight of a pair, in samples of a pair seen from both sides: that of a pair seen from one only.

What is known of a pair may be old, and its weight next to nothing, but it is better than a guess.
"""
SEEN = 1e-6
"""Weight below which an option counts as never seen: the past fades by a factor each step."""


def potentials(sums: Tensor, counts: Tensor) -> Tensor:
    """The effect of each option on the loss, relative to the decision's mean.

    Args:
        sums: ``[D, K, K]``; ``sums[d, j, k]`` adds up ``G_jk - G_jj`` over the samples of decision d
            with option j in place.
        counts: ``[D, K]``, the weight of those samples.

    Returns:
        ``[D, K]`` fp64 in units of the loss, of mean zero; all zero where nothing was sampled yet.
    """
    sums, counts = sums.double(), counts.double()
    seen = counts > SEEN
    there = torch.where(seen[..., None], sums / counts.where(seen, 1.0)[..., None], 0.0)
    back = -there.transpose(-1, -2)
    from_here, from_there = seen[..., None], seen[..., None, :]
    both = from_here & from_there
    difference = torch.where(both, (there + back) / 2, there + back)
    # The variance of a difference is that of two means; twice the weight of n and n samples is n.
    total = counts[..., None] + counts[..., None, :]
    weight = 2 * counts[..., None] * counts[..., None, :] / total.where(total > 0, 1.0)
    weight = torch.where(both, weight.clamp(min=ONE_SIDED), ONE_SIDED * (from_here | from_there))
    weight = weight * (1 - torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device))
    laplacian = torch.diag_embed(weight.sum(-1)) - weight
    # Adding ones picks the solution of mean zero; a decision that was never sampled gets an identity.
    system = laplacian + torch.where(seen.any(-1)[:, None, None], 1.0, torch.eye(weight.shape[-1]).to(weight))
    solution: Tensor = torch.linalg.solve(system, (weight * difference).sum(-2)[..., None])
    return solution[..., 0]


def pool(sums: Tensor, counts: Tensor, outcome: Tensor, outcomes: int) -> tuple[Tensor, Tensor]:
    """What was learned of K options, as what is known of their C outcomes.

    Args:
        sums: ``[D, K, K]``, as for :func:`potentials`; options that are alike have equal gradients.
        counts: ``[D, K]``.
        outcome: ``[D, K]`` int64, the outcome of each option.
        outcomes: C, the same for all.

    Returns:
        ``[D, C, C]`` and ``[D, C]``.
    """
    members = torch.nn.functional.one_hot(outcome, outcomes).to(sums)
    means = members / members.sum(1, keepdim=True)
    return members.mT @ sums @ means, (members.mT @ counts[..., None])[..., 0]


_DECADES = (-20, 5)
"""Of the temperature, around the largest spread of the effects."""
_POINTS, _ROUNDS = 33, 5
"""The range of temperatures shrinks by 32 each round: to some 1e-6 of the temperature."""


def logits_of_entropy(effects: list[Tensor], entropy: float) -> list[Tensor]:
    """``-v / T`` for every decision, with the one temperature T that gives the entropy wanted.

    Args:
        effects: potentials ``[D, K]`` of decisions with K options, a tensor for each K.
        entropy: mean over all decisions whose effects differ of the entropy of ``softmax(-v / T)``,
            as a share of ``log K``; in (0, 1). The others stay open, whatever the temperature.

    Returns:
        Logits like ``effects``; zeros where the effects say nothing at all.
    """
    spreads = [v.amax(-1) - v.amin(-1) for v in effects]
    several = [v[own > 0] for v, own in zip(effects, spreads, strict=True)]
    spread = max((float(own.max()) for own in spreads if own.numel()), default=0.0)
    if not spread > 0:
        return [torch.zeros_like(v) for v in effects]
    mean_entropy = _MeanEntropy(several)
    fractions = torch.linspace(0, 1, _POINTS).to(effects[0])
    low, high = (fractions.new_tensor(math.log(spread) + d * math.log(10)) for d in _DECADES)
    for _ in range(_ROUNDS):
        points = torch.lerp(low, high, fractions)
        # It grows with the temperature. All this without a look at the values: on a GPU nothing waits.
        above = (mean_entropy(points.exp()) < entropy).sum().clamp(1, _POINTS - 1)
        low, high = points[above - 1], points[above]
    temperature = ((low + high) / 2).exp()
    return [-v / temperature for v in effects]


_NOTHING = -750.0
"""Log of a probability that is zero in fp64."""


class _MeanEntropy:
    """Mean entropy of ``softmax(-v / temperature)`` over all decisions, as a share of ``log K``."""

    def __init__(self, effects: list[Tensor]) -> None:
        rows = [v.amin(-1, keepdim=True) - v for v in effects if len(v)]
        width = max(v.shape[-1] for v in rows)
        # An option of infinite potential has no probability, and adds no entropy.
        padded = [torch.nn.functional.pad(v, (0, width - v.shape[-1]), value=-math.inf) for v in rows]
        self.below = torch.cat(padded)
        self.most = torch.cat([v.new_full((len(v),), math.log(v.shape[-1])) for v in rows])

    def __call__(self, temperatures: Tensor) -> Tensor:
        """Shares ``[T]`` at each of ``temperatures``."""
        # Written out: softmax over a few values each takes several times as long.
        exponents = (self.below / temperatures[:, None, None]).clamp_(min=_NOTHING)
        parts = exponents.exp()
        total = parts.sum(-1)
        entropy = total.log() - (parts * exponents).sum(-1) / total
        shares: Tensor = entropy / self.most
        return shares.mean(-1)

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
        sums: ``[K, K]``, as for :func:`potentials`; options that are alike have equal gradients.
        counts: ``[K]``.
        outcome: ``[K]`` int64, the outcome of each option.
        outcomes: C.

    Returns:
        ``[C, C]`` and ``[C]``.
    """
    members = (
        torch.zeros(len(counts), outcomes)
        .to(sums)
        .index_put_((torch.arange(len(counts), device=sums.device), outcome), sums.new_ones(()))
    )
    return members.T @ sums @ (members / members.sum(0)), members.T @ counts


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
    low, high = math.log(spread) - 20 * math.log(10), math.log(spread) + 5 * math.log(10)
    for _ in range(48):
        middle = (low + high) / 2
        if _mean_entropy(several, math.exp(middle)) < entropy:
            low = middle
        else:
            high = middle
    temperature = math.exp((low + high) / 2)
    return [-v / temperature for v in effects]


def _mean_entropy(effects: list[Tensor], temperature: float) -> float:
    """Of ``softmax(-v / temperature)``, as shares of ``log K``, over all decisions."""
    total, count = 0.0, 0
    for v in (v for v in effects if len(v)):
        log_p = torch.log_softmax(-v / temperature, dim=-1)
        total += float(-torch.xlogy(log_p.exp(), log_p.exp()).sum()) / math.log(v.shape[-1])
        count += len(v)
    return total / count

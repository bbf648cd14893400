"""What a tensor's options cost, from few inputs: noisy estimates, drawn towards what squared errors say.

Two estimates of the cost of an option are at hand. The curvature along its own error is right in the mean,
and noisy: a few inputs hold most of it, and of two dozen options the best sum takes those that the inputs at
hand flatter. Its squared error times one curvature a tensor, HAWQ-V2's way (arXiv 1911.03852), has
one factor that is noisy for all options together, and is wrong as far as errors lie in directions of other
curvature. The ratio of the two is therefore a common factor, times how the directions differ, times noise
whose size is known; its best estimate lies in between (empirical Bayes, Efron and Morris 1973).
"""

from __future__ import annotations

import torch
from torch import Tensor

FEWEST = 3
"""Options that a spread can be told from."""


def shrink(cost: Tensor, error: Tensor, distortion: Tensor) -> Tensor:
    """The posterior mean (of the logarithm) of the costs of a tensor's options.

    With ``r = log(cost / distortion)``, whose standard error is ``s = error / cost``, the ratios are taken
    as ``N(c, t^2)`` around a common c, observed with noise ``N(0, s^2)``: each becomes
    ``c + t^2 / (t^2 + s^2) (r - c)``, with c and t^2 by their moments.

    Args:
        cost: ``[K]``, in any unit; options of no cost, such as the one in place, keep what they have.
        error: ``[K]``, the standard errors.
        distortion: ``[K]``, squared errors of the options, in any unit.

    Returns:
        ``[K]``; ``cost`` itself where fewer than three options can be compared.
    """
    known = (cost > 0) & (distortion > 0) & torch.isfinite(cost)
    if int(known.sum()) < FEWEST:
        return cost
    ratio, noise = torch.log(cost[known] / distortion[known]), (error[known] / cost[known]).square()
    weight = 1 / noise.clamp(min=torch.finfo(noise.dtype).tiny)
    center = (weight * ratio).sum() / weight.sum()
    spread = ((ratio - center).square().mean() - noise.mean()).clamp(min=0)
    kept = spread / (spread + noise).clamp(min=torch.finfo(noise.dtype).tiny)
    found = cost.clone()
    found[known] = distortion[known] * torch.exp(center + kept * (ratio - center))
    return found

"""What options cost, from few inputs: noisy estimates, drawn towards what squared errors say.

Two estimates of the cost of an option are at hand. The curvature along its own error is right in the mean,
and noisy: a few inputs hold most of it, and of two dozen options the best sum takes those that the inputs at
hand flatter. Its squared error times the mean curvature of its tensor, HAWQ-V2's way (arXiv 1911.03852), is
the mean over all directions: hardly noisy, and wrong as far as errors lie in directions of other
curvature. The ratio of the two is therefore a factor common to all tensors, times how the errors of a tensor
differ from those of others, times how those of an option differ from its tensor's, times noise whose size is
known; the best estimate lies in between on both levels (empirical Bayes, Efron and Morris 1973).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST = 3
"""Options, or tensors, that a spread can be told from."""


def shrink(
    costs: Mapping[str, Tensor], errors: Mapping[str, Tensor], priors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The posterior means (of the logarithms) of what the options of tensors of one kind cost.

    With ``r_tk = log(cost / prior)`` of option k of tensor t, whose standard error is ``s_tk = error /
    cost``, tensors are taken as ``c_t ~ N(m, T^2)`` and their options as ``r_tk ~ N(c_t, t^2)`` around
    that, observed with noise ``N(0, s_tk^2)``: c is drawn towards m, and r towards c, each by the share of
    noise in what is seen to differ. Means and spreads follow by their moments. All options of a tensor are
    seen on the same inputs, so that what their mean is off by counts as much as what one of them is.

    Args:
        costs: ``[K]`` by tensor, in any unit; options of no cost, such as the one in place, keep that.
        errors: ``[K]``, the standard errors.
        priors: ``[K]``, what the mean curvature makes of the options, in any unit.

    Returns:
        ``[K]`` by tensor; the costs themselves of tensors where fewer than three options can be compared.
    """
    found = {name: cost.clone() for name, cost in costs.items()}
    seen = {name: _Ratios.of(cost, errors[name], priors[name]) for name, cost in costs.items()}
    known = {name: ratios for name, ratios in seen.items() if ratios is not None}
    if not known:
        return found
    centers = _posterior(
        torch.stack([ratios.center for ratios in known.values()]),
        torch.stack([ratios.noise.mean() for ratios in known.values()]),
    )
    for (name, ratios), center in zip(known.items(), centers, strict=True):
        found[name][ratios.where] = priors[name][ratios.where] * torch.exp(center + ratios.deviation())
    return found


@dataclass(frozen=True)
class _Ratios:
    """Of one tensor: the options that can be compared, their ``r`` and ``s^2``."""

    where: Tensor
    ratio: Tensor
    noise: Tensor

    @classmethod
    def of(cls, cost: Tensor, error: Tensor, prior: Tensor) -> _Ratios | None:
        where = (cost > 0) & (prior > 0) & torch.isfinite(cost) & torch.isfinite(prior)
        if int(where.sum()) < FEWEST:
            return None
        least = torch.finfo(cost.dtype).tiny
        noise = (error[where] / cost[where]).square().clamp(min=least)
        return cls(where, torch.log(cost[where] / prior[where]), noise)

    @property
    def center(self) -> Tensor:
        """The mean ratio."""
        return _mean(self.ratio, self.noise)

    def deviation(self) -> Tensor:
        """What is left of each option's difference to the mean."""
        return _posterior(self.ratio, self.noise) - self.center


def _mean(seen: Tensor, noise: Tensor) -> Tensor:
    weight = 1 / noise
    return (weight * seen).sum() / weight.sum()


def _posterior(seen: Tensor, noise: Tensor) -> Tensor:
    """Of values with a common mean: each is drawn towards it by the share of noise in what it differs."""
    if len(seen) < FEWEST:
        return seen
    center = _mean(seen, noise)
    spread = ((seen - center).square().mean() - noise.mean()).clamp(min=0)
    return center + spread / (spread + noise) * (seen - center)

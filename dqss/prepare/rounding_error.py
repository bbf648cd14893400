"""What rounding a layer's input and weight costs its output, on average, and the factors that cost least.

Rounding to steps of ``d`` is taken as noise of power ``d^2 / 12`` that knows nothing of what is rounded. An
input has one step for all channels, each output channel of a weight one of its own; both follow from the
largest values, as of channels divided by their factors and weights multiplied by them:

* inputs: ``d^2 / 12 * sum_i f_i^2 |w_i|^2``, since the weights of channel i pass on what they get,
* weights: ``sum_o d_o^2 / 12 * sum_i K x_i^2 / f_i^2``, K weights for each pair of channels.

SmoothQuant (arXiv 2211.10438, eq. 4) balances largest activations with largest weights instead, by a strength
that has to be tried, and knows one reader of the channels; a sum is read by several, in ranges of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dqss.prepare.modules import Layer, groups_of

SHARPEST = 24.0
"""Power that stands for a largest value: nearly it, yet with a gradient for all that are large."""
ITERATIONS = 60
_LEAST = 1e-30


@dataclass(frozen=True)
class Ranges:
    """Of the channels of an input; each ``[C]``, double, on the CPU.

    Attributes:
        lowest, highest: at most 0, and at least 0: zero is on every grid.
        power: mean square.
    """

    lowest: Tensor
    highest: Tensor
    power: Tensor

    @classmethod
    def of(cls, x: Tensor, axis: int) -> Ranges:
        """Of a tensor whose channels are along ``axis``."""
        rows = x.detach().double().transpose(0, axis).flatten(1).cpu()
        return cls(rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0), rows.square().mean(1))


class RoundedLayer:
    """A layer whose input and weight are rounded.

    Args:
        layer: with its weight.
        ranges: of its input.
        weight_bits, bits: of its weight (symmetric, a step for each output channel) and of its input (affine,
            one step); None stays in float.
    """

    def __init__(self, layer: Layer, ranges: Ranges, weight_bits: int | None, bits: int | None) -> None:
        self.ranges, self.weight_bits, self.bits = ranges, weight_bits, bits
        weight, groups = layer.weight.detach().double().cpu(), groups_of(layer)
        # [groups, outputs of a group, its inputs, K]
        self.weight = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)

    @property
    def used(self) -> Tensor:
        """``[C]``: channels that are something and are read."""
        return (self.ranges.power > 0) & (self.weight.abs().amax((1, 3)).flatten() > 0)

    def error(self, factors: Tensor) -> Tensor:
        """Expected squared error of the output, summed over its channels; a scalar.

        Args:
            factors: ``[C]``, double: channels are divided by them, their weights multiplied.
        """
        groups, _, inputs, size = self.weight.shape
        scaled = self.weight * factors.reshape(groups, 1, inputs, 1)
        total = factors.new_zeros(())
        if self.bits is not None:
            sides = self.ranges.highest / factors, -self.ranges.lowest / factors
            width = sum(_largest(side, 0, self.bits) for side in sides)
            total = total + (width / (2**self.bits - 1)).square() / 12 * scaled.square().sum()
        if self.weight_bits is not None:
            steps = _largest(scaled.abs().flatten(2), 2, self.weight_bits) / (2 ** (self.weight_bits - 1) - 1)
            power = (self.ranges.power / factors.square()).reshape(groups, inputs).sum(1)
            total = total + (steps.square().sum(1) / 12 * power * size).sum()
        return total


def best_factors(layers: Sequence[RoundedLayer], gains: Sequence[float]) -> Tensor:
    """Factors with the least sum of the layers' expected errors, each times its gain.

    Args:
        layers: all that read the channels.
        gains: what a squared error of each one's output is worth.

    Returns:
        ``[C]``, double, of geometric mean 1; 1 for channels that nothing makes or nothing reads.
    """
    used = torch.stack([layer.used for layer in layers]).any(0)
    logs = torch.zeros(len(used), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logs], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        factors = torch.where(used, logs, 0.0).exp()
        parts = [gain * layer.error(factors) for layer, gain in zip(layers, gains, strict=True)]
        total = torch.stack(parts).sum().clamp(min=_LEAST).log()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    if used.any():
        with torch.enable_grad():
            optimizer.step(loss)  # type: ignore[no-untyped-call]
    found = torch.where(used, logs.detach(), 0.0)
    return torch.where(used, found - found[used].mean(), 0.0).exp() if used.any() else found.exp()


def _largest(values: Tensor, axis: int, bits: int) -> Tensor:
    """What a grid of so many bits reaches to, of non-negative values: never less than the largest.

    It is a sum of powers, so that many large values count for more than one. With few bits a grid clips the
    largest values and does not follow them: the power is 6 for four bits, and doubles with every two more.
    """
    power = min(SHARPEST, 6.0 * 2 ** ((bits - 4) / 2))
    return torch.logsumexp(power * values.clamp(min=_LEAST).log(), axis).div(power).exp()

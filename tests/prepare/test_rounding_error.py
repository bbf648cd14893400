"""Expected errors are those of real rounding; the factors found are as good as those of a search by hand."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.prepare.rounding_error import Ranges, RoundedLayer, best_factors


def rounded(x: Tensor, step: Tensor | float) -> Tensor:
    return torch.round(x / step) * step


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bits", [(None, 8), (6, None), (6, 8)])
def test_the_error_of_rounding_is_what_is_expected(groups: int, bits: tuple[int | None, int | None]) -> None:
    torch.manual_seed(0)
    weight_bits, input_bits = bits
    layer = nn.Conv2d(4, 6, 3, groups=groups, bias=False).double()
    sizes, factors = torch.tensor([1.0, 2.0, 3.0, 9.0]).double(), torch.tensor([0.5, 1.0, 1.0, 2.0]).double()
    with torch.no_grad():  # one weight of each output by far the largest: the mean of powers is it
        layer.weight[:, 0, 1, 1] += 3.0
    x = (torch.rand(8, 4, 40, 40).double() - 0.3) * sizes.reshape(-1, 1, 1)
    expected = RoundedLayer(layer, Ranges.of(x, 1), weight_bits, input_bits).error(factors)
    wide = factors.reshape(groups, 1, -1, 1, 1).expand(groups, 6 // groups, -1, 1, 1).flatten(0, 1)
    given, weight = x / factors.reshape(-1, 1, 1), layer.weight.detach() * wide
    wanted = F.conv2d(given, weight, groups=groups)
    if input_bits is not None:
        given = rounded(given, (given.max() - given.min()) / (2**input_bits - 1))
    if weight_bits is not None:
        steps = weight.abs().amax((1, 2, 3), keepdim=True) / (2 ** (weight_bits - 1) - 1)
        weight = rounded(weight, steps)
    found = (F.conv2d(given, weight, groups=groups) - wanted).square().mean((0, 2, 3)).sum()
    # 54 or 108 weights round by chance, their inputs are not white: a factor of two for them.
    low, high = (0.9, 1.1) if weight_bits is None else (0.4, 2.0)
    assert low * found < expected < high * found


def test_factors_for_two_readers_are_as_good_as_the_best_of_a_grid() -> None:
    torch.manual_seed(0)
    sizes = torch.tensor([1.0, 9.0, 70.0]), torch.tensor([20.0, 2.0, 30.0])
    convolutions = [nn.Conv2d(3, 5, 1).double() for _ in sizes]
    with torch.no_grad():
        convolutions[1].weight.mul_(torch.tensor([5.0, 1.0, 0.1]).reshape(3, 1, 1))
    inputs = [torch.randn(4, 3, 9, 9).double() * size.reshape(-1, 1, 1) for size in sizes]
    gains, bits = (1.0, 0.25), (6, 6)

    def error(factors: Tensor) -> float:
        """With the largest values themselves."""
        total = 0.0
        for gain, x, layer in zip(gains, inputs, convolutions, strict=True):
            given, weight = x / factors.reshape(-1, 1, 1), layer.weight.detach()[..., 0, 0] * factors
            step = (given.max() - given.min()) / (2 ** bits[1] - 1)
            steps = weight.abs().amax(1) / (2 ** (bits[0] - 1) - 1)
            total += gain * float(step**2 * weight.square().sum())
            total += gain * float(steps.square().sum() * given.square().mean((0, 2, 3)).sum())
        return total

    layers = [RoundedLayer(c, Ranges.of(x, 1), *bits) for c, x in zip(convolutions, inputs, strict=True)]
    found = best_factors(layers, gains)
    assert float(found.log().mean()) == pytest.approx(0, abs=1e-9)
    # Only the ratios of factors matter.
    grid = itertools.product(torch.arange(-8, 8.1, 0.25).double().tolist(), repeat=2)
    best = min(error(2.0 ** torch.tensor([0.0, *each], dtype=torch.float64)) for each in grid)
    assert error(found) < 1.1 * best < 0.5 * error(torch.ones(3).double())


def test_channels_that_nothing_makes_or_reads_are_left() -> None:
    layer = nn.Conv2d(4, 2, 1)
    with torch.no_grad():
        layer.weight[:, 3] = 0
    x = torch.randn(2, 4, 8, 8) * torch.tensor([0.0, 1.0, 16.0, 16.0]).reshape(-1, 1, 1)
    found = best_factors([RoundedLayer(layer, Ranges.of(x, 1), 8, 8)], [1.0])
    assert found[[0, 3]].tolist() == [1, 1] and found[2] > 2 * found[1]
    assert best_factors([RoundedLayer(layer, Ranges.of(0 * x, 1), 8, 8)], [1.0]).tolist() == [1] * 4

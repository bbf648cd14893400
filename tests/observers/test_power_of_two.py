"""Power-of-two scales against all of them, with all zero points."""

import numpy as np
import pytest
import torch

from dqss.functional import fake_quantize
from dqss.observers import Statistics
from dqss.observers.power_of_two import PowerOfTwo
from dqss.spec import QuantSpec


def rows(n=800):
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(0))
    x[1] = x[1].relu() * 100
    x[2] = x[2].exp() - 0.2
    x[3, :2] = 40
    x[4] = -x[4].abs() * 1e-3 - 1e-3
    return x


def brute_force(x, spec):
    """Least squared error over every power of two and, on affine grids, every zero point."""
    x = x.astype(np.float64)
    best = np.inf
    for exponent in range(-24, 8):
        scale = 2.0**exponent
        for zero_point in range(spec.qmin, spec.qmax + 1) if not spec.symmetric else (0,):
            codes = np.clip(np.round(x / scale) + zero_point, spec.qmin, spec.qmax)
            best = min(best, (((codes - zero_point) * scale - x) ** 2).sum())
    return best


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize(("symmetric", "signed"), [(True, True), (True, False), (False, True)])
def test_close_to_brute_force_and_exactly_a_power_of_two(bits, symmetric, signed):
    x, spec = rows(), QuantSpec(bits, symmetric, signed=signed)
    scale, zero_point = PowerOfTwo().qparams(Statistics.of(x), spec)
    assert (torch.frexp(scale).mantissa == 0.5).all()
    quantized = fake_quantize(x, scale[:, None], zero_point[:, None], spec)
    errors = (quantized - x).double().square().sum(1)
    for c in range(len(x)):
        assert errors[c] <= 1.02 * brute_force(x[c].numpy(), spec), c


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_range_is_where_values_are_rounded_and_not_clipped(symmetric):
    x, spec = rows(), QuantSpec(3, symmetric)
    scale, zero_point = (part[:, None] for part in PowerOfTwo().qparams(Statistics.of(x), spec))
    low, high = (end[:, None] for end in PowerOfTwo().clip_range(Statistics.of(x), spec))
    inside = (x >= low) & (x <= high)
    assert ((fake_quantize(x, scale, zero_point, spec) - x).abs() <= scale / 2)[inside].all()
    clamped = fake_quantize(x.clamp(low, high), scale, zero_point, spec)
    upper = (x > high) | ((x < low) & (not symmetric))  # symmetric grids have one more code below
    assert torch.equal(clamped[upper], fake_quantize(x, scale, zero_point, spec)[upper])
    assert upper.any()


def test_scale_may_be_the_exact_maximum():
    x = torch.tensor([[-7.0, -3.0, 1.0, 7.0]])
    assert PowerOfTwo().qparams(Statistics.of(x), QuantSpec(4, True))[0] == 1.0

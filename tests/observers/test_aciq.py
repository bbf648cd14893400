"""ACIQ against the paper's published optima, Monte-Carlo and numerical integration."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from dqss.functional import fake_quantize
from dqss.observers import Statistics
from dqss.observers.aciq import ACIQGaussian, ACIQLaplace, gaussian_tail, laplace_tail, optimal_step
from dqss.spec import QuantSpec

DENSITIES = {"gaussian": (gaussian_tail, stats.norm), "laplace": (laplace_tail, stats.laplace)}


@pytest.mark.parametrize(
    ("name", "bits", "published"),
    [
        *[("gaussian", 2, 1.71), ("gaussian", 3, 2.15), ("gaussian", 4, 2.55)],
        *[("laplace", 2, 2.83), ("laplace", 3, 3.89), ("laplace", 4, 5.03)],
    ],
)
def test_published_optima(name, bits, published):
    half = 2 ** (bits - 1)
    assert optimal_step(DENSITIES[name][0], half, half) * half == pytest.approx(
        published, abs=0.01
    )  # cut to two places


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("t", [0.0, 0.5, 1.7, 4.0])
def test_tails_are_the_integrals_they_claim_to_be(name, t):
    tail, density = DENSITIES[name]
    expected, _ = integrate.quad(lambda x: (x - t) ** 2 * density.pdf(x), t, math.inf)
    assert tail(t) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize(("below", "above"), [(7.5, 7.5), (8, 7), (0, 15), (0, 3)])
def test_monte_carlo_finds_the_same_optimum(name, below, above):
    tail, density = DENSITIES[name]
    x = density.rvs(size=400_000, random_state=np.random.default_rng(0))
    x = x if below else np.abs(x)

    def sampled(step):
        clipped = np.clip(x, -below * step, above * step)
        return np.mean((x - clipped) ** 2) + step**2 / 12

    step = optimal_step(tail, below, above)
    around = step * np.linspace(0.8, 1.25, 91)
    errors = np.array([sampled(s) for s in around])
    assert around[errors.argmin()] == pytest.approx(step, rel=0.02)
    assert sampled(step) <= 1.001 * errors.min()


@pytest.mark.parametrize(("algorithm", "name"), [(ACIQGaussian(), "gaussian"), (ACIQLaplace(), "laplace")])
@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", ["two-sided", "positive", "negative"])
def test_near_the_best_clip_on_data_of_its_density(algorithm, name, bits, symmetric, form):
    x = DENSITIES[name][1].ppf((np.arange(30_000) + 0.5) / 30_000)  # even the tails have their share
    x = {"two-sided": x, "positive": np.maximum(x, 0), "negative": np.minimum(x, 0)}[form]
    rows = torch.from_numpy(3 * x).float()[None]
    spec = QuantSpec(bits, symmetric)
    low, high = algorithm.clip_range(Statistics.of(rows), spec)
    assert (form != "positive" or symmetric) or low == 0
    assert (form != "negative" or symmetric) or high == 0

    def error(factor):
        steps = spec.qmax if symmetric else spec.qmax - spec.qmin
        scale = factor * (high if symmetric else high - low) / steps
        zero_point = torch.zeros(1) if symmetric else torch.round(-low * factor / scale)
        return float((fake_quantize(rows, scale, zero_point, spec) - rows).square().mean())

    assert error(1.0) <= 1.03 * min(error(factor) for factor in np.linspace(0.7, 1.4, 22))


def test_exact_zeros_do_not_narrow_the_fit():
    x = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)).abs()
    padded = torch.cat([x, torch.zeros(1, 20_000)], dim=1)
    for algorithm in (ACIQGaussian(), ACIQLaplace()):
        for symmetric in (True, False):
            spec = QuantSpec(3, symmetric)
            plain, spiked = (algorithm.clip_range(Statistics.of(y), spec)[1] for y in (x, padded))
            torch.testing.assert_close(plain, spiked)


def test_affine_range_follows_the_mean():
    x = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0)) + 2
    low, high = ACIQGaussian().clip_range(Statistics.of(x), QuantSpec(3, False))
    assert float((low + high) / 2) == pytest.approx(2.0, abs=0.03)
    half = 7 / 2
    assert float((high - low) / 2) == pytest.approx(optimal_step(gaussian_tail, half, half) * half, rel=0.02)

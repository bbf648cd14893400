"""Entropy calibration against a plain one-bin-at-a-time computation with scipy's divergence."""

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from dqss.observers import HistogramAccumulator, Statistics
from dqss.observers.entropy import Entropy, _Sums, divergence
from dqss.spec import QuantSpec


def plain_divergence(values, counts, low, high, spec):
    """KL of the quantized histogram, from the definition."""
    inside = (values >= low) & (values <= high)
    p = np.where(inside, counts, 0.0)
    if not p.any():
        return np.inf
    scale = np.float32(high if spec.symmetric else high - low) / (
        spec.qmax if spec.symmetric else spec.qmax - spec.qmin
    )
    offset = 0 if spec.symmetric else np.round(-low / scale)
    codes = np.floor(values / scale + np.float32(0.5)) + offset  # halves upwards: bins do fall on them
    codes = np.clip(codes, spec.qmin, spec.qmax)
    q = np.zeros_like(p)
    for code in np.unique(codes):
        share = (codes == code) & (p > 0)
        if share.any():
            q[share] = p[share].mean()
    occupied = np.flatnonzero(p)
    p[occupied[0]] += counts[values < low].sum()
    p[occupied[-1]] += counts[values > high].sum()
    return entropy(p, q)


def histogram(kind, n=20_000, bins=2048):
    x = torch.randn(1, n, generator=torch.Generator().manual_seed(0))
    x[0, :5] *= 8
    x = {"signed": x, "positive": x.abs(), "shifted": x + 1.5}[kind]
    accumulator = HistogramAccumulator(1, bins)
    accumulator.update(x)
    return accumulator.statistics()


def full(stats, spec):
    low, high = min(float(stats.minimum), 0.0), max(float(stats.maximum), 0.0)
    return (-max(-low, high), max(-low, high)) if spec.symmetric else (low, high)


@pytest.mark.parametrize("kind", ["signed", "positive", "shifted"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_running_sums_give_the_plain_divergence(kind, symmetric, bits):
    stats, spec = histogram(kind), QuantSpec(bits, symmetric)
    low, high = full(stats, spec)
    shares = np.random.default_rng(0).uniform(0.003, 1.0, (40, 2))
    shares[0] = 1.0
    if symmetric:
        shares[:, 0] = shares[:, 1]
    ends = torch.tensor(shares * np.array([low, high]), dtype=torch.float32)
    found = divergence(_Sums.of(stats), ends[:, None], spec)[:, 0]
    values, counts = stats.values[0].numpy(), stats.counts[0].double().numpy()
    for (a, b), kl in zip(ends.numpy(), found.tolist(), strict=True):
        assert kl == pytest.approx(plain_divergence(values, counts, a, b, spec), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", ["signed", "positive"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_near_the_least_divergence_of_a_dense_grid(kind, symmetric, bits):
    stats, spec = histogram(kind), QuantSpec(bits, symmetric)
    values, counts = stats.values[0].numpy(), stats.counts[0].double().numpy()
    low, high = full(stats, spec)
    one_end = symmetric or low == 0
    shares = np.linspace(0.05, 1, 100 if one_end else 12)
    grid = [(a, a) for a in shares] if one_end else [(a, b) for a in shares for b in shares]
    ends = [(np.float32(a * low), np.float32(b * high)) for a, b in grid]
    best = min(plain_divergence(values, counts, a, b, spec) for a, b in ends)
    a, b = (end.numpy()[0] for end in Entropy().clip_range(stats, spec))
    assert plain_divergence(values, counts, a, b, spec) <= 1.15 * best  # it is a jagged function


def test_outliers_are_clipped_and_clean_ranges_are_not():
    x = torch.rand(1, 50_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    spec = QuantSpec(8, True)
    _, high = Entropy().clip_range(Statistics.of(x), spec)
    assert float(high) >= 0.98
    x[0, 0] = 50.0
    _, high = Entropy().clip_range(Statistics.of(x), spec)
    assert float(high) <= 5


def test_zeros_are_no_evidence():
    x = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)).abs()
    results = []
    for zeros in (0, 20_000):
        accumulator = HistogramAccumulator(1)
        accumulator.update(torch.cat([x, torch.zeros(1, zeros + 1)], dim=1))
        results.append(Entropy().clip_range(accumulator.statistics(), QuantSpec(4, False)))
    assert results[0] == results[1]

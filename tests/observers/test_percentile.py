"""Percentile against numpy's quantiles."""

import numpy as np
import pytest
import torch

from dqss.errors import SearchSpaceError
from dqss.observers import HistogramAccumulator, Statistics
from dqss.observers.percentile import Percentile
from dqss.spec import QuantSpec

METHOD = "inverted_cdf"


def rows(n=3001):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(0))
    x[1] = x[1].exp()
    x[2] = -x[2].abs()
    return x


@pytest.mark.parametrize("p", [50.0, 90.0, 99.0, 99.9, 99.99, 100.0])
def test_symmetric_is_the_quantile_of_magnitudes(p):
    x = rows()
    low, high = Percentile(p).clip_range(Statistics.of(x), QuantSpec(8, True))
    expected = np.quantile(x.abs().numpy(), p / 100, axis=1, method=METHOD)
    np.testing.assert_array_equal(high.numpy(), expected)
    assert torch.equal(low, -high)


@pytest.mark.parametrize("p", [90.0, 99.0, 99.9, 100.0])
def test_affine_cuts_both_tails_or_the_only_one(p):
    x = rows()
    low, high = Percentile(p).clip_range(Statistics.of(x), QuantSpec(8, False))
    both = (1 + p / 100) / 2
    assert high[0] == np.quantile(x[0].numpy(), both, method=METHOD)
    assert low[0] == -np.quantile(-x[0].numpy(), both, method=METHOD)
    assert high[1] == np.quantile(x[1].numpy(), p / 100, method=METHOD) and low[1] == 0
    assert low[2] == -np.quantile(-x[2].numpy(), p / 100, method=METHOD) and high[2] == 0


def test_counts_are_weights():
    values = torch.tensor([[0.5, 1.0, 2.0, 4.0, 8.0]])
    counts = torch.tensor([[3.0, 0.0, 4.0, 2.0, 1.0]])
    stats = Statistics(values, counts, values[:, 0], values[:, -1])
    for p in (10, 30, 31, 50, 70, 71, 89, 90, 91, 99):
        repeated = np.repeat(values[0].numpy(), counts[0].int().numpy())
        expected = np.quantile(repeated, p / 100, method=METHOD)
        for symmetric in (True, False):
            assert Percentile(p).clip_range(stats, QuantSpec(4, symmetric))[1] == expected


def test_histogram_is_right_within_a_bin():
    x = rows(20_000)
    accumulator = HistogramAccumulator(3)
    for batch in x.split(900, dim=1):
        accumulator.update(batch)
    stats = accumulator.statistics()
    for symmetric in (True, False):
        spec = QuantSpec(8, symmetric)
        binned = torch.stack(Percentile(99.9).clip_range(stats, spec))
        exact = torch.stack(Percentile(99.9).clip_range(Statistics.of(x), spec))
        assert ((binned - exact).abs() <= stats.width).all()


def test_mostly_zero_channel_falls_back_to_its_range():
    x = torch.zeros(1, 10_000)
    x[0, 0] = 3.0
    low, high = Percentile(99.0).clip_range(Statistics.of(x), QuantSpec(4, False))
    assert (low, high) == (0.0, 3.0)


@pytest.mark.parametrize("p", [0.0, -5.0, 100.1, float("nan")])
def test_bad_percentage(p):
    with pytest.raises(SearchSpaceError, match="percentile: p="):
        Percentile(p)

"""The streaming histogram against numpy on the whole stream."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqss.errors import DataError, NonFiniteError
from dqss.observers import HistogramAccumulator


def accumulate(batches, channels, bins=2048):
    accumulator = HistogramAccumulator(channels, bins)
    for batch in batches:
        accumulator.update(batch)
    return accumulator


def stream(seed=0, channels=3, n=5000):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(channels, n, generator=generator)
    x *= torch.tensor([1e-3, 1.0, 300.0])[:channels, None]
    x[-1] = x[-1].relu()
    x[0, -1] = 5.0  # late outlier: the range grows many times over
    return x


@pytest.mark.parametrize("bins", [2, 3, 64, 2048])
def test_counts_equal_numpy_on_the_concatenation(bins):
    x = stream()
    accumulator = accumulate(x.split(137, dim=1), 3, bins)
    stats = accumulator.statistics()
    assert accumulator.count == x.shape[1]
    assert torch.equal(stats.minimum, x.amin(1)) and torch.equal(stats.maximum, x.amax(1))
    for c in range(3):
        values, width = x[c].double().numpy(), float(stats.width[c])
        assert np.log2(width).is_integer()
        numbers = np.floor(values[values != 0] / width)
        assert numbers.max() - numbers.min() < bins
        unique, expected = np.unique(numbers, return_counts=True)
        centres = np.clip((unique + 0.5) * width, values.min(), values.max())
        counts = stats.counts[c].numpy()
        zero = stats.values[c].numpy() == 0
        assert counts[zero].sum() == (values == 0).sum()
        occupied = (counts > 0) & ~zero
        np.testing.assert_allclose(stats.values[c].numpy()[occupied], centres, rtol=1e-6)
        np.testing.assert_array_equal(counts[occupied], expected)
        assert np.all(np.diff(stats.values[c].numpy()) >= 0)


def test_at_least_half_of_the_bins_are_in_use():
    x = torch.linspace(-1, 3, 100_000)[None]
    stats = accumulate([x], 1, 256).statistics()
    assert int((stats.counts > 0).sum()) >= 127


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(1, 900), min_size=1, max_size=8),
    channels=st.sampled_from([1, 3]),
)
def test_statistics_do_not_depend_on_batches_or_their_order(seed, sizes, channels):
    x = stream(seed, channels, sum(sizes))
    whole = accumulate([x], channels).statistics()
    shuffled = x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))]
    for batches in (x.split(sizes, dim=1), shuffled.split(sizes, dim=1)):
        cut = accumulate(batches, channels).statistics()
        for name in ("values", "counts", "minimum", "maximum", "width"):
            assert torch.equal(getattr(whole, name), getattr(cut, name)), name


def test_range_grows_from_nothing_to_the_end_of_fp32():
    batches = [torch.zeros(1, 4), torch.full((1, 5), 1e-38), torch.full((1, 2), -1e-12)]
    batches += [torch.full((1, 3), 3.0), torch.full((1, 6), -3e38), torch.full((1, 7), 3e38)]
    stats = accumulate(batches, 1).statistics()
    values, counts = stats.values[0], stats.counts[0]
    assert counts.sum() == 27 and counts[values == 0] == 4
    assert counts[0] == 6 and counts[-(counts.flip(0) > 0).int().argmax() - 1] == 7
    for seen in (-3e38, 3e38):
        assert (values - seen).abs()[counts > 0].min() <= stats.width / 2


def test_channels_are_independent():
    x = stream()
    together = accumulate(x.split(700, dim=1), 3).statistics()
    for c in range(3):
        alone = accumulate([x[c : c + 1]], 1).statistics()
        assert torch.equal(together.values[c], alone.values[0])
        assert torch.equal(together.counts[c], alone.counts[0])


def test_constant_values_are_kept_exactly():
    stats = accumulate([torch.tensor([[0.1, 0.1], [-7.0, -7.0]])], 2).statistics()
    seen = stats.values[stats.counts > 0]
    assert torch.equal(seen, torch.tensor([0.1, -7.0]))


def test_counts_beyond_fp32_integers_are_exact():
    accumulator = HistogramAccumulator(1)
    accumulator.update(torch.ones(1, 1).expand(1, 2**24 + 2))  # fp32 cannot count past 2^24 by ones
    assert accumulator.statistics().counts.max() == 2**24 + 2


@pytest.mark.parametrize("bins", [2, 64, 2048])
def test_importance_equals_numpy_histogram_and_stays_with_its_values(bins):
    x = stream()
    weights = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) * 1e-9
    accumulator = accumulate(x.split(800, dim=1), 3, bins)
    before = accumulator.statistics()
    assert before.importance is None
    for rows, part in zip(x.split(333, dim=1), weights.split(333, dim=1), strict=True):
        accumulator.weigh(rows, part)
    stats = accumulator.statistics()
    for name in ("values", "counts", "minimum", "maximum"):
        assert torch.equal(getattr(stats, name), getattr(before, name))
    for c in range(3):
        values, width = x[c].double().numpy(), float(stats.width[c])
        zero = values == 0
        numbers = np.floor(values / width)
        own = weights[c].double().numpy()
        wanted = [own[(numbers == k) & ~zero].sum() for k in np.unique(numbers[~zero])]
        found = stats.importance[c][(stats.importance[c] > 0) & (stats.values[c] != 0)]
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9)
        at_zero = stats.importance[c][stats.values[c] == 0].sum()
        assert float(at_zero) == pytest.approx(own[zero].sum(), rel=1e-9)
    with pytest.raises(ValueError, match="after the last"):
        accumulator.update(x)


def test_extremes_of_batches_are_kept_where_asked():
    x = stream()
    parts = x.split(137, dim=1)
    accumulator = HistogramAccumulator(3, keep_batches=True)
    for part in parts:
        accumulator.update(part)
    kept = accumulator.statistics().batches
    assert torch.equal(kept.minima, torch.stack([part.amin(1) for part in parts]))
    assert torch.equal(kept.maxima, torch.stack([part.amax(1) for part in parts]))
    assert accumulate(parts, 3).statistics().batches is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channels", [1, 3])
def test_non_finite_values_are_refused_and_leave_no_trace(bad, channels):
    accumulator = accumulate([stream(0, channels)], channels)
    before = accumulator.statistics()
    batch = torch.ones(channels, 10)
    batch[-1, 4] = bad
    with pytest.raises(NonFiniteError, match=r"1 NaN|1 infinite"):
        accumulator.update(batch)
    assert torch.equal(accumulator.statistics().counts, before.counts)
    assert torch.equal(accumulator.statistics().maximum, before.maximum)


def test_nothing_seen_is_an_error():
    accumulator = HistogramAccumulator(2)
    accumulator.update(torch.empty(2, 0))
    with pytest.raises(DataError, match="no values"):
        accumulator.statistics()


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    x = stream()
    here = accumulate(x.split(137, dim=1), 3).statistics()
    there = accumulate(x.cuda().split(137, dim=1), 3).statistics()
    assert torch.equal(here.values, there.values.cpu())
    assert torch.equal(here.counts, there.counts.cpu())

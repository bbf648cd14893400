"""The coarse histogram against numpy's, and its counts against the values themselves."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqss.observers.base import Statistics
from dqss.observers.coarse import BINS, CoarseHistogram
from dqss.observers.histogram import HistogramAccumulator


@given(st.integers(0, 10**6), st.integers(1, 300), st.sampled_from([0.0, 0.5]))
def test_counts_of_values_are_numpys(seed: int, size: int, sparse: float) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    values[: int(sparse * size)] = 0.0
    found = CoarseHistogram.of_values(values)
    wanted, _ = np.histogram(values.double().numpy(), BINS, (found.low, found.high))
    assert sum(found.counts) == size
    # A value on an edge may round to either side of it.
    assert np.abs(np.cumsum(found.counts) - np.cumsum(wanted)).max() <= 1
    assert (found.low, found.high) == (float(values.min()), float(values.max()))
    assert found.zeros == int((values == 0).sum())


def test_what_was_observed_counts_within_a_fine_bin_of_its_place() -> None:
    batches = [torch.randn(2, 4000, generator=torch.Generator().manual_seed(k)).relu() for k in range(3)]
    accumulator = HistogramAccumulator(2)
    for batch in batches:
        accumulator.update(batch)
    stats = accumulator.statistics()
    found, values = CoarseHistogram.of(stats), torch.cat(batches, 1).double().reshape(-1)
    assert sum(found.counts) == values.numel() and found.zeros == int((values == 0).sum())
    assert stats.width is not None
    # The number of values up to an edge lies between those up to half a fine bin before and after it.
    fine = float(stats.width.max()) / 2
    edges = np.linspace(found.low, found.high, BINS + 1)[1:-1]
    for edge, below in zip(edges, np.cumsum(found.counts), strict=False):
        assert int((values < edge - fine).sum()) <= below <= int((values <= edge + fine).sum())


def test_a_single_value_is_one_bin() -> None:
    found = CoarseHistogram.of(Statistics.of(torch.full((3, 5), 2.5)))
    assert found.low == found.high == 2.5 and found.counts[0] == 15 and sum(found.counts) == 15

"""Moving averages against torch's own observers, and against the recurrence in plain Python."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.ao.quantization.observer import (
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
)

from dqss.errors import SearchSpaceError
from dqss.observers import HistogramAccumulator, Statistics
from dqss.observers.minmax import MinMax
from dqss.observers.moving_average import MovingAverage
from dqss.spec import QuantSpec

SIGNED, UNSIGNED, AFFINE = QuantSpec(8, True), QuantSpec(8, True, signed=False), QuantSpec(8, False)
KINDS = ("skewed", "one-sided", "negative", "constant", "single", "outliers", "growing")


def batches(kind, channels=1, count=9):
    generator = torch.Generator().manual_seed(3)
    found = [torch.randn(channels, 20, generator=generator) for _ in range(count)]
    made = {
        "skewed": lambda i, x: x.exp() - 0.3,
        "one-sided": lambda i, x: x.relu(),
        "negative": lambda i, x: -x.abs() - 1,
        "constant": lambda i, x: torch.full_like(x, 2.5),
        "single": lambda i, x: x[:, :1],
        "outliers": lambda i, x: x * (1000 if i == 4 else 1),
        "growing": lambda i, x: x * (i + 1),
    }
    return [made[kind](i, x) for i, x in enumerate(found)]


def observed(stream, channels):
    accumulator = HistogramAccumulator(channels, keep_batches=True)
    for batch in stream:
        accumulator.update(batch)
    return accumulator.statistics()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_qparams_are_torch_aos(kind, channels, momentum):
    stream = batches(kind, channels)
    stats = observed(stream, channels)
    for spec, qscheme, dtype in (
        (AFFINE, torch.per_tensor_affine, torch.quint8),
        (SIGNED, torch.per_tensor_symmetric, torch.qint8),
    ):
        if channels == 1:
            theirs = MovingAverageMinMaxObserver(1 - momentum, dtype=dtype, qscheme=qscheme)
        else:
            qscheme = {
                torch.per_tensor_affine: torch.per_channel_affine,
                torch.per_tensor_symmetric: torch.per_channel_symmetric,
            }[qscheme]
            theirs = MovingAveragePerChannelMinMaxObserver(1 - momentum, dtype=dtype, qscheme=qscheme)
        for batch in stream:
            theirs(batch)
        wanted, wanted_zero = theirs.calculate_qparams()
        scale, zero_point = MovingAverage(momentum).qparams(stats, spec)
        # Torch divides a symmetric range into 127.5 steps, not 127.
        factor = 127.5 / 127 if spec.symmetric else 1.0
        torch.testing.assert_close(scale, factor * wanted.reshape(-1).float(), rtol=2e-5, atol=0)
        assert ((zero_point - wanted_zero.reshape(-1)).abs() <= 1).all()  # a tie may fall either way


@given(
    stream=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=4), min_size=1, max_size=8),
    momentum=st.floats(0, 0.999),
)
def test_it_is_the_recurrence(stream, momentum):
    low, high = min(stream[0]), max(stream[0])
    for batch in stream[1:]:
        low = momentum * low + (1 - momentum) * min(batch)
        high = momentum * high + (1 - momentum) * max(batch)
    everything = [value for batch in stream for value in batch]
    stats = observed([torch.tensor([batch]) for batch in stream], 1)
    found = [end.item() for end in MovingAverage(momentum).clip_range(stats, AFFINE)]
    if max(high, 0) - min(low, 0) > 1e-30 or not any(everything):
        assert found == pytest.approx([min(low, 0), max(high, 0)], rel=1e-5, abs=1e-30)
    else:  # an empty range would say nothing about the data
        assert found == [min(*everything, 0), max(*everything, 0)]
    found = [end.item() for end in MovingAverage(momentum).clip_range(stats, SIGNED)]
    if max(high, -low) > 1e-30:
        assert found == pytest.approx([-max(high, -low), max(high, -low)], rel=1e-5)
    rectified = [[max(value, 0.0) for value in batch] for batch in stream]
    again = observed([torch.tensor([batch]) for batch in rectified], 1)
    ours = MovingAverage(momentum).qparams(stats, UNSIGNED)
    assert torch.equal(ours[0], MovingAverage(momentum).qparams(again, AFFINE)[0]) and ours[1] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_for_weights_it_is_min_max(kind):
    stats = Statistics.of(torch.cat(batches(kind, 3), dim=1))
    for spec in (SIGNED, UNSIGNED, AFFINE):
        for ours, theirs in zip(
            MovingAverage().qparams(stats, spec), MinMax().qparams(stats, spec), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_one_odd_batch_is_forgotten():
    stream = batches("outliers")
    assert MinMax().clip_range(observed(stream, 1), AFFINE)[1] > 1000
    assert MovingAverage(0.5).clip_range(observed(stream, 1), AFFINE)[1] < 200


def test_memory_is_bounded_and_the_latest_batches_are_kept():
    accumulator = HistogramAccumulator(1, keep_batches=True)
    for number in range(1500):
        accumulator.update(torch.tensor([[float(number)]]))
    kept = accumulator.statistics().batches
    assert kept.minima.shape == (1024, 1) and kept.maxima[-1] == 1499 and kept.minima[0] == 1500 - 1024
    assert HistogramAccumulator(1)._batches is None  # only where an algorithm asks


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 2.0, float("nan")])
def test_bad_momentum(momentum):
    with pytest.raises(SearchSpaceError, match="moving_average: momentum="):
        MovingAverage(momentum)

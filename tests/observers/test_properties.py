"""What every algorithm promises on any data."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqss.errors import SearchSpaceError
from dqss.functional import channel_view, fake_quantize
from dqss.observers import ALGORITHMS, HistogramAccumulator, Statistics, build
from dqss.spec import Candidate, PerChannel, PerTensor, QuantSpec

KINDS = ("normal", "skewed", "positive", "negative", "constant", "zero", "outliers", "sparse", "mixed")
NAMES = sorted(ALGORITHMS)


def made(kind, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "skewed":
        x = x.exp() - 0.5
    elif kind == "positive":
        x = x.relu()
    elif kind == "negative":
        x = -x.abs() - 2
    elif kind == "constant":
        x = torch.full(shape, float(x.flatten()[0]))
    elif kind == "zero":
        x = torch.zeros(shape)
    elif kind == "outliers":
        x[0, 0] = 1e4 * x[0, 0]
    elif kind == "sparse":
        x = x * (torch.rand(shape, generator=generator) < 0.02)
    elif kind == "mixed":  # channels of very different size, one of them empty
        x = x * torch.logspace(-6, 6, shape[0])[:, None]
        x[-1] = 0
    return x


@st.composite
def tensors(draw):
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(1, 1), (3, 1), (2, 5), (3, 300)]))
        return made(draw(st.sampled_from(KINDS)), shape, draw(st.integers(0, 100)))
    number = st.floats(-1e4, 1e4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-4)
    columns = draw(st.integers(1, 12))
    flat = draw(st.lists(number, min_size=2 * columns, max_size=2 * columns))
    return torch.tensor(flat).view(2, columns)


specs = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    granularity=st.sampled_from([PerTensor(), PerChannel(0)]),
)


def statistics(x, spec, binned):
    rows = channel_view(x, spec.granularity)
    if not binned:
        return rows, Statistics.of(rows)
    accumulator = HistogramAccumulator(rows.shape[0])
    accumulator.update(rows)
    return rows, accumulator.statistics()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(x=tensors(), spec=specs, binned=st.booleans())
def test_parameters_are_valid(name, x, spec, binned):
    rows, stats = statistics(x, spec, binned)
    algorithm = ALGORITHMS[name]()
    scale, zero_point = algorithm.qparams(stats, spec)
    low, high = algorithm.clip_range(stats, spec)
    assert scale.shape == zero_point.shape == low.shape == high.shape == rows.shape[:1]
    assert scale.dtype == zero_point.dtype == torch.float32
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert torch.equal(zero_point, zero_point.round())
    assert (zero_point >= spec.qmin).all() and (zero_point <= spec.qmax).all()

    zeros = fake_quantize(torch.zeros(len(rows)), scale, zero_point, spec)
    assert (zeros == 0).all()
    assert torch.isfinite(fake_quantize(rows, scale[:, None], zero_point[:, None], spec)).all()

    least, most = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if spec.symmetric:
        assert torch.equal(low, -high) and (zero_point == 0).all()
        assert (high <= torch.maximum(-least, most)).all() and (high >= 0).all()
    else:
        assert (low >= least).all() and (high <= most).all() and (low <= 0).all() and (high >= 0).all()
    assert torch.equal(high > low, most > least)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(x=tensors(), spec=specs, binned=st.booleans(), exponent=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_the_grid_exactly(name, x, spec, binned, exponent):
    rows, stats = statistics(x, spec, binned)
    _, scaled = statistics(x * 2.0**exponent, spec, binned)
    scale, zero_point = ALGORITHMS[name]().qparams(stats, spec)
    other, other_zero_point = ALGORITHMS[name]().qparams(scaled, spec)
    some = rows.abs().amax(1) > 0
    assert torch.equal(other[some], scale[some] * 2.0**exponent)
    assert torch.equal(other_zero_point, zero_point)


@pytest.mark.parametrize("name", NAMES)
def test_constants_keep_their_value(name):
    """A constant is the end of its own range: no algorithm has a reason to clip it far."""
    for value in (5.0, -0.3):
        stats = Statistics.of(torch.full((1, 50), value))
        scale, zero_point = ALGORITHMS[name]().qparams(stats, QuantSpec(8, False))
        restored = fake_quantize(torch.tensor([value]), scale, zero_point, QuantSpec(8, False))
        assert float(restored) == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bits(name):
    x = made("normal", (2, 500), 0)
    for symmetric in (True, False):
        spec = QuantSpec(16, symmetric, PerChannel(0))
        scale, zero_point = ALGORITHMS[name]().qparams(Statistics.of(x), spec)
        error = fake_quantize(x, scale[:, None], zero_point[:, None], spec) - x
        assert error.abs().max() <= 0.3 if name == "percentile" else error.square().mean() <= 1e-4


def test_registry_builds_every_algorithm_with_its_parameters():
    for name in NAMES:
        defaults = dataclasses.asdict(ALGORITHMS[name]())
        assert build(Candidate.of(name, QuantSpec(4, True), defaults)) == ALGORITHMS[name]()
    with pytest.raises(SearchSpaceError, match="did you mean 'percentile'"):
        build(Candidate.of("percentil", QuantSpec(4, True)))
    with pytest.raises(SearchSpaceError, match="no parameter 'q'"):
        build(Candidate.of("percentile", QuantSpec(4, True), {"q": 99.0}))

"""What every algorithm promises on any data."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqss.errors import SearchSpaceError
from dqss.functional import channel_view, fake_quantize
from dqss.observers import ALGORITHMS, HistogramAccumulator, Statistics, build
from dqss.spec import Candidate, PerChannel, PerGroup, PerTensor, QuantSpec

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


SCHEMES = ((True, True), (True, False), (False, True))
specs = st.builds(
    lambda bits, scheme, granularity: QuantSpec(bits, scheme[0], granularity, scheme[1]),
    bits=st.integers(2, 8),
    scheme=st.sampled_from(SCHEMES),
    granularity=st.sampled_from([PerTensor(), PerChannel(0), PerGroup(1), PerGroup(4), PerGroup(7)]),
)


def importance_of(x):
    """Uneven, with zeros; rows and columns of it do not sum to the same."""
    generator = torch.Generator().manual_seed(x.numel())
    drawn = torch.rand(x.shape, generator=generator) ** 8
    return 1e-9 * drawn * (torch.rand(x.shape, generator=generator) < 0.7)


def statistics(x, spec, binned):
    """Rows, and all that is known of them, as weights have it or as activations do (``binned``)."""
    rows, importance = (channel_view(part, spec.granularity) for part in (x, importance_of(x)))
    if not binned:
        counts = channel_view(torch.ones_like(x), spec.granularity, fill=0)
        importance = channel_view(importance_of(x), spec.granularity, fill=0)
        return rows, Statistics.of(rows, counts, importance)
    accumulator = HistogramAccumulator(rows.shape[0], keep_batches=True)
    for batch in rows.split(max(1, rows.shape[1] // 3), dim=1):
        accumulator.update(batch)
    accumulator.weigh(rows, importance)
    return rows, accumulator.statistics()


def seen(rows, spec):
    """What the grid can tell apart: unsigned symmetric ones have no negative codes."""
    return rows.clamp(min=0) if spec.symmetric and not spec.signed else rows


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(x=tensors(), spec=specs, binned=st.booleans())
def test_parameters_are_valid(name, x, spec, binned):
    rows, stats = statistics(x, spec, binned)
    algorithm = ALGORITHMS[name]()
    scale, zero_point = algorithm.qparams(stats, spec)
    low, high = algorithm.clip_range(stats.within(spec), spec)
    assert scale.shape == zero_point.shape == low.shape == high.shape == rows.shape[:1]
    assert scale.dtype == zero_point.dtype == torch.float32
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert torch.equal(zero_point, zero_point.round())
    assert (zero_point >= spec.qmin).all() and (zero_point <= spec.qmax).all()

    zeros = fake_quantize(torch.zeros(len(rows)), scale, zero_point, spec)
    assert (zeros == 0).all()
    assert torch.isfinite(fake_quantize(rows, scale[:, None], zero_point[:, None], spec)).all()

    rows = seen(rows, spec)
    least, most = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if spec.symmetric and spec.signed:
        assert torch.equal(low, -high) and (zero_point == 0).all()
        assert (high <= torch.maximum(-least, most)).all() and (high >= 0).all()
    else:
        assert (low >= least).all() and (high <= most).all() and (low <= 0).all() and (high >= 0).all()
        assert not spec.symmetric or (zero_point == 0).all()
    assert torch.equal(high > low, most > least)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"power_of_two"}))
@settings(max_examples=20, deadline=None)
@given(x=tensors(), bits=st.integers(2, 8), binned=st.booleans())
def test_unsigned_grids_are_affine_ones_of_what_is_not_negative(name, x, bits, binned):
    """Clipping at zero first changes nothing; the zero point of one-sided data is 0 anyway."""
    unsigned, affine = QuantSpec(bits, True, signed=False), QuantSpec(bits, False)
    algorithm = ALGORITHMS[name]()
    for positive in (x.clamp(min=0), x) if not binned else (x.clamp(min=0),):
        _, stats = statistics(positive, unsigned, binned)
        _, one_sided = statistics(x.clamp(min=0), affine, binned)
        ours, theirs = algorithm.qparams(stats, unsigned), algorithm.qparams(one_sided, affine)
        assert torch.equal(ours[0], theirs[0]) and (theirs[1] == 0).all() and (ours[1] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(x=tensors(), spec=specs, binned=st.booleans(), exponent=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_the_grid_exactly(name, x, spec, binned, exponent):
    rows, stats = statistics(x, spec, binned)
    _, scaled = statistics(x * 2.0**exponent, spec, binned)
    scale, zero_point = ALGORITHMS[name]().qparams(stats, spec)
    other, other_zero_point = ALGORITHMS[name]().qparams(scaled, spec)
    some = seen(rows, spec).abs().amax(1) > 0
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
    for symmetric, signed in SCHEMES:
        spec = QuantSpec(16, symmetric, PerChannel(0), signed)
        scale, zero_point = ALGORITHMS[name]().qparams(Statistics.of(x), spec)
        error = fake_quantize(x, scale[:, None], zero_point[:, None], spec) - seen(x, spec)
        assert error.abs().max() <= 0.3 if name == "percentile" else error.square().mean() <= 1e-4


def test_registry_builds_every_algorithm_with_its_parameters():
    for name in NAMES:
        defaults = dataclasses.asdict(ALGORITHMS[name]())
        assert build(Candidate.of(name, QuantSpec(4, True), defaults)) == ALGORITHMS[name]()
    with pytest.raises(SearchSpaceError, match="did you mean 'percentile'"):
        build(Candidate.of("percentil", QuantSpec(4, True)))
    with pytest.raises(SearchSpaceError, match="no parameter 'q'"):
        build(Candidate.of("percentile", QuantSpec(4, True), {"q": 99.0}))

"""MSE and Lp against brute force over dense grids of clip ranges, computed with numpy."""

import numpy as np
import pytest
import torch

from dqss.errors import SearchSpaceError
from dqss.functional import fake_quantize
from dqss.observers import HistogramAccumulator, Statistics
from dqss.observers.compress import compress, rebin
from dqss.observers.lp import Lp
from dqss.observers.minmax import MinMax
from dqss.observers.mse import MSE
from dqss.spec import QuantSpec

KINDS = ("normal", "laplace", "relu", "skewed", "gelu", "bimodal", "outliers", "sparse", "negative")


def sample(kind, n=1000, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n)
    made = {
        "normal": lambda: x,
        "laplace": lambda: rng.laplace(size=n),
        "relu": lambda: np.maximum(x, 0),
        "skewed": lambda: np.exp(x) - 0.3,
        "gelu": lambda: np.where(x > 0, x, 0.1 * np.sin(x)),
        "bimodal": lambda: np.where(np.arange(n) < n // 2, x - 3, 0.3 * x + 2),
        "outliers": lambda: np.where(np.arange(n) < n // 300, 40 * x, x),
        "sparse": lambda: np.where(rng.random(n) < 0.5, x, 0),
        "negative": lambda: -np.abs(x) - 1,
    }
    return made[kind]().astype(np.float32)


def errors_of(x, low, high, spec, order):
    """Sums of powers of the quantization error, one for each range: plain numpy."""
    steps = spec.qmax if spec.symmetric else spec.qmax - spec.qmin
    scale = ((high if spec.symmetric else high - low) / steps)[:, None]
    offset = 0.0 if spec.symmetric else np.clip(np.round(-low[:, None] / scale), spec.qmin, spec.qmax)
    codes = np.clip(np.round(x / scale) + offset, spec.qmin, spec.qmax)
    return (np.abs((codes - offset) * scale - x) ** order).sum(axis=1)


def brute_force(x, spec, order, points=1001):
    x = x.astype(np.float64)
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    if spec.symmetric:
        ends = np.linspace(0, 1, points)[1:] * max(-low, high)
        return errors_of(x, -ends, ends, spec, order).min()
    share = np.linspace(0, 1, 61)
    if low == 0 or high == 0:
        share = np.linspace(0, 1, points)[1:]
        return errors_of(x, share * low, share * high, spec, order).min()
    best = np.inf
    for part in share[1:]:
        best = min(best, errors_of(x, np.full_like(share, part * low), share * high, spec, order).min())
    return best


def true_error(x, algorithm, spec, order, stats=None):
    rows = torch.from_numpy(x)[None]
    scale, zero_point = algorithm.qparams(stats or Statistics.of(rows), spec)
    return float((fake_quantize(rows, scale, zero_point, spec) - rows).double().abs().pow(order).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize(("algorithm", "order"), [(MSE(), 2.0), (Lp(), 2.4), (Lp(p=1.0), 1.0)], ids=str)
def test_at_most_two_percent_above_brute_force(kind, symmetric, algorithm, order):
    x = sample(kind)
    for bits in (2, 3, 4, 6) if order > 1 else (2, 4):  # order 1 is more jagged still
        spec = QuantSpec(bits, symmetric)
        found = true_error(x, algorithm, spec, order)
        assert found <= 1.02 * brute_force(x, spec, order), bits
        assert found <= true_error(x, MinMax(), spec, order)


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"negative"}))
@pytest.mark.parametrize(("algorithm", "order"), [(MSE(), 2.0), (Lp(), 2.4)], ids=str)
def test_unsigned_symmetric_grids_too(kind, algorithm, order):
    """The brute force knows nothing of what is done with negative values: it counts their error."""
    x = sample(kind)
    for bits in (2, 3, 4, 6):
        spec = QuantSpec(bits, True, signed=False)
        found = true_error(x, algorithm, spec, order)
        high = np.linspace(0, 1, 1001)[1:] * x.max()
        scale = (high / (2**bits - 1))[:, None]
        real = np.clip(np.round(x.astype(np.float64) / scale), 0, 2**bits - 1) * scale
        assert found <= 1.02 * (np.abs(real - x) ** order).sum(axis=1).min(), bits
        assert found <= true_error(x, MinMax(), spec, order)


@pytest.mark.parametrize("kind", ["normal", "relu", "outliers"])
def test_eight_bits_and_histograms(kind):
    x = sample(kind, 20_000)
    accumulator = HistogramAccumulator(1)
    for batch in torch.from_numpy(x)[None].split(4000, dim=1):
        accumulator.update(batch)
    for bits, symmetric in ((4, True), (4, False), (8, True)):
        spec = QuantSpec(bits, symmetric)
        best = brute_force(x, spec, 2.0, 401) if symmetric else true_error(x, MSE(), spec, 2.0)
        assert true_error(x, MSE(), spec, 2.0) <= 1.02 * best
        # Bins hide where values lie inside them: at 8 bits a few percent of the error.
        slack = 1.02 if bits == 4 else 1.05
        assert true_error(x, MSE(), spec, 2.0, accumulator.statistics()) <= slack * best


@pytest.mark.parametrize("n", [6000, 30_000])
def test_long_channels_are_searched_as_well_as_short_ones(n):
    for kind in ("normal", "outliers", "sparse"):
        x = sample(kind, n)
        for bits in (2, 8):
            spec = QuantSpec(bits, True)
            assert true_error(x, MSE(), spec, 2.0) <= 1.02 * brute_force(x, spec, 2.0, 401)


def test_channels_do_not_influence_each_other():
    rows = torch.stack([torch.from_numpy(sample(kind)) for kind in KINDS])
    for symmetric in (True, False):
        spec = QuantSpec(4, symmetric)
        together = MSE().qparams(Statistics.of(rows), spec)
        for c in range(len(KINDS)):
            alone = MSE().qparams(Statistics.of(rows[c : c + 1]), spec)
            error, least = (
                (fake_quantize(rows[c], scale, zero_point, spec) - rows[c]).double().square().sum()
                for scale, zero_point in ([part[c] for part in together], [part[0] for part in alone])
            )
            # Compiled sums may be added up in another order; eager ones agree bit for bit (test_fused.py).
            assert float(error) == pytest.approx(float(least), rel=1e-3)


def test_compressed_samples_keep_counts_zeros_and_extremes():
    rows = torch.stack([torch.from_numpy(sample(kind, 30_000)) for kind in ("outliers", "sparse", "relu")])
    stats = Statistics.of(rows)
    small = compress(stats, 512)
    assert small.values.shape[1] <= 520
    assert torch.equal(small.counts.sum(1), torch.full((3,), 30_000.0))
    assert (small.values.diff(dim=1) >= 0).all()
    assert torch.equal((small.counts * (small.values == 0)).sum(1), (rows == 0).sum(1).float())
    assert torch.equal((small.values[:, 0], small.values[:, -1])[1], stats.maximum)
    spread = (stats.maximum - stats.minimum) / 256
    cdf = [np.interp(small.values[c], stats.values[c], np.arange(30_000)) for c in range(3)]
    for c in range(3):  # no run is longer than n / 256 values unless they are equal, nor wider than 1 / 256
        moved = small.counts[c].cumsum(0).numpy() - cdf[c]
        assert np.quantile(np.abs(moved[small.values[c].numpy() != 0]), 0.99) <= max(2 * 30_000 / 256, 1)
    exact = (rows.double() ** 2).sum(1)
    kept = (small.counts.double() * small.values.double() ** 2).sum(1)
    assert ((kept - exact).abs() <= 2 * spread.double() * rows.double().abs().sum(1)).all()


def test_rebinned_counts_equal_numpy_histogram():
    x = sample("skewed", 10_000)
    stats = rebin(Statistics.of(torch.from_numpy(x)[None]), 64)
    expected, edges = np.histogram(x.astype(np.float64), 64)
    assert np.abs(stats.counts[0].numpy() - expected).sum() <= 2  # a value on an edge may change sides
    np.testing.assert_allclose(stats.values[0].numpy(), (edges[1:] + edges[:-1]) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, -1.0, 11.0, float("nan")])
def test_bad_exponent(p):
    with pytest.raises(SearchSpaceError, match="lp: p="):
        Lp(p=p)

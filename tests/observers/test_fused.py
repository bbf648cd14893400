"""The fused loops of calibration against the eager ones, and many tensors at once against one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqss import fused
from dqss.errors import NonFiniteError
from dqss.functional import fake_quantize
from dqss.observers import ALGORITHMS, HistogramAccumulator, Problem, Statistics, build, loops, solve_together
from dqss.observers.clip_search import qparam_errors
from dqss.spec import Candidate, QuantSpec
from dqss.supernet import Supernet
from tests.support.nets import cnn, images, small_space

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "relu": lambda x: x.relu(),
    "relu6": lambda x: (40 * x).clamp(0, 6),
    "constant": lambda x: torch.full_like(x, -0.3),
    "zero": torch.zeros_like,
    "signed zeros": lambda x: -0.0 * x,
    "outlier": lambda x: x.index_fill(1, torch.tensor([x.shape[1] - 1]), 3e4),
    "tiny": lambda x: 1e-30 * x,
}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    broken = fused.Kernel.broken
    yield
    fused.Kernel.broken = broken


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """Large enough for fused loops to run."""
    channels = draw(st.sampled_from([1, 3]))
    n = draw(st.integers(2048, 5000))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    x = KINDS[draw(st.sampled_from(sorted(KINDS)))](torch.randn(channels, n, generator=generator))
    return x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


def accumulated(x: Tensor, compiled: bool, size: int) -> HistogramAccumulator:
    accumulator = HistogramAccumulator(x.shape[0], keep_batches=True)
    with fused.fused(compiled):
        for part in x.split(size, dim=1):
            accumulator.update(part)
    return accumulator


def assert_same(one: Statistics, other: Statistics) -> None:
    for name in ("values", "counts", "minimum", "maximum", "width"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.batches is not None and other.batches is not None
    assert torch.equal(one.batches.minima, other.batches.minima)
    assert torch.equal(one.batches.maxima, other.batches.maxima)


@settings(max_examples=40)
@given(x=rows(), size=st.sampled_from([5000, 2500]))
def test_fused_histograms_are_the_eager_ones(x: Tensor, size: int) -> None:
    found, wanted = accumulated(x, True, size), accumulated(x, False, size)
    assert not fused.Kernel.broken
    assert_same(found.statistics(), wanted.statistics())


@settings(max_examples=30)
@given(x=rows(), bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]), where=st.floats(0, 1))
def test_values_that_are_not_finite_are_refused_and_leave_nothing(
    x: Tensor, bad: float, where: float
) -> None:
    spoiled = x.clone()
    spoiled[-1, int(where * (x.shape[1] - 1))] = bad
    words = "1 NaN and 0 infinite" if bad != bad else "0 NaN and 1 infinite"
    for compiled in (True, False):
        accumulator = accumulated(x, compiled, 5000)
        before = accumulator.statistics()
        with fused.fused(compiled), pytest.raises(NonFiniteError, match=f"{words} among {x.numel()} values"):
            accumulator.update(spoiled)
        assert_same(accumulator.statistics(), before)


def test_a_bad_value_behind_many_good_ones_leaves_nothing_of_them() -> None:
    x = torch.randn(1, 600_000)
    accumulator = accumulated(x[:, :1000], True, 1000)
    before = accumulator.statistics()
    x[0, -1] = torch.nan
    with pytest.raises(NonFiniteError, match="1 NaN"):
        accumulator.update(2 * x)
    assert_same(accumulator.statistics(), before)


@settings(max_examples=25)
@given(
    x=rows(),
    order=st.sampled_from([2.0, 2.4, 3.0]),
    bits=st.integers(2, 8),
    affine=st.booleans(),
    binned=st.booleans(),
)
def test_fused_errors_are_the_eager_ones(
    x: Tensor, order: float, bits: int, affine: bool, binned: bool
) -> None:
    x = x.float()
    stats = accumulated(x, False, 5000).statistics() if binned else Statistics.of(x)
    stats, _ = stats.normalized()
    spec = QuantSpec(bits, symmetric=not affine)
    scale = torch.logspace(-3, 0.5, 7)[:, None].expand(-1, len(x)) / spec.qmax
    zero_point = torch.zeros_like(scale) + (3 if affine else 0)
    errors = []
    for compiled in (True, False):
        with fused.fused(compiled):
            errors.append(qparam_errors(stats, scale, zero_point, spec, order))
    assert not fused.Kernel.broken
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-4, atol=1e-12)
    # And both are those of the functions that quantize later.
    values = stats.values
    plain = [
        (
            (fake_quantize(values, s[:, None], z[:, None], spec) - values).double().abs() ** order
            * stats.counts
        ).sum(1)
        for s, z in zip(scale, zero_point, strict=True)
    ]
    torch.testing.assert_close(errors[1].double(), torch.stack(plain), rtol=1e-4, atol=1e-12)


def test_errors_of_any_order() -> None:
    stats, spec = Statistics.of(torch.randn(2, 50)), QuantSpec(3, symmetric=True)
    for order in (0.5, 1.0, 2.0, 3.0, 3.5, 4.0):
        found = qparam_errors(stats, torch.full((1, 2), 0.4), torch.zeros(1, 2), spec, order)
        off = (fake_quantize(stats.values, torch.tensor(0.4), torch.tensor(0.0), spec) - stats.values).abs()
        torch.testing.assert_close(found[0], off.pow(order).sum(1))


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("binned", [True, False])
def test_side_by_side_is_one_by_one(name: str, affine: bool, binned: bool) -> None:
    """Bit for bit, whatever stands beside a tensor."""
    spec = QuantSpec(4, symmetric=not affine)
    kinds = [kind(torch.randn(2, 700) * 10.0**k) for k, kind in enumerate(KINDS.values())]
    several = [accumulated(x, False, 300).statistics() if binned else Statistics.of(x) for x in kinds]
    several.insert(3, Statistics.of(torch.randn(1, 77)))  # of another length
    algorithm = build(Candidate.of(name, spec))
    with fused.fused(False):
        found = solve_together([Problem(algorithm, stats, spec) for stats in several])
        for (scale, zero_point), stats in zip(found, several, strict=True):
            wanted = algorithm.qparams(stats, spec)
            assert torch.equal(scale, wanted[0]) and torch.equal(zero_point, wanted[1])


def grids(compiled: bool) -> list[Tensor]:
    torch.manual_seed(0)
    supernet = Supernet(cnn(), small_space(4, ["minmax", "mse", "lp", "percentile"]))
    with fused.fused(compiled):
        supernet.calibrate([images(16), images(16) * 2])
    return [
        part
        for q in supernet.quantizers()
        for k in range(4)
        for part in (q[k].grid().scale, q[k].grid().zero_point)
    ]


def test_without_a_compiler_networks_are_calibrated_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = grids(False)

    def missing(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(fused.Kernel, "broken", False)
    for kernel in (loops.place, loops.errors(2.0), loops.errors(2.4)):
        monkeypatch.setattr(kernel, "compiled", missing)
    with pytest.warns(UserWarning, match="no C.. compiler found$") as caught:
        found = grids(True)
    assert len(caught) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

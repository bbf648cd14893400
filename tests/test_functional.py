"""Grids and rounding against torch's own fake quantization, torch.ao's qparams, and numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.ao.quantization.observer import MinMaxObserver

from dqss.functional import (
    broadcast_channels,
    channel_count,
    channel_view,
    choose_qparams,
    common_granularity,
    dequantize,
    fake_quantize,
    from_channel_view,
    quantize,
    refine_channels,
)
from dqss.spec import PerChannel, PerGroup, PerTensor, QuantSpec

schemes = st.sampled_from([(True, True), (True, False), (False, True)])
specs = st.builds(
    lambda bits, scheme: QuantSpec(bits, scheme[0], signed=scheme[1]),
    st.integers(2, 8) | st.just(12),
    schemes,
)
seeds = st.integers(0, 2**31)


def away_from_ties(scale: torch.Tensor, shape: tuple[int, ...], spec: QuantSpec) -> torch.Tensor:
    """Values up to half a range outside the grid, none within a twentieth of a step of a tie.

    Torch multiplies by the reciprocal of the scale where we divide, so the two may round a tie
    to different sides; nowhere else may they differ.
    """
    span = spec.qmax - spec.qmin
    steps = torch.randint(-2 * span, 2 * span, shape) + (torch.rand(shape) - 0.5) * 0.9
    return steps * scale


@given(specs, seeds)
def test_fake_quantize_is_torchs_per_tensor(spec: QuantSpec, seed: int) -> None:
    torch.manual_seed(seed)
    scale = 10 ** (torch.rand(()) * 4 - 3)
    zero_point = torch.tensor(0.0 if spec.symmetric else float(torch.randint(0, spec.qmax + 1, ())))
    x = away_from_ties(scale, (4, 9), spec).requires_grad_()
    y = x.detach().clone().requires_grad_()
    g = torch.randn(4, 9)
    ours = fake_quantize(x, scale, zero_point, spec)
    theirs = torch.fake_quantize_per_tensor_affine(y, float(scale), int(zero_point), spec.qmin, spec.qmax)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    ours.backward(g)
    theirs.backward(g)
    assert torch.equal(x.grad, y.grad)
    assert 0 < (x.grad == 0).sum() < x.numel()  # both sides of the clip range were visited


@given(specs, st.integers(0, 2), seeds)
def test_fake_quantize_is_torchs_per_channel(spec: QuantSpec, axis: int, seed: int) -> None:
    torch.manual_seed(seed)
    shape = (3, 4, 5)
    scale = 10 ** (torch.rand(shape[axis]) * 4 - 3)
    zero_point = (
        torch.zeros_like(scale) if spec.symmetric else torch.randint(0, spec.qmax + 1, scale.shape).float()
    )
    wide = broadcast_channels(scale, shape, PerChannel(axis))
    x = away_from_ties(wide, shape, spec).requires_grad_()
    y = x.detach().clone().requires_grad_()
    g = torch.randn(shape)
    ours = fake_quantize(x, wide, broadcast_channels(zero_point, shape, PerChannel(axis)), spec)
    theirs = torch.fake_quantize_per_channel_affine(y, scale, zero_point, axis, spec.qmin, spec.qmax)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    ours.backward(g)
    theirs.backward(g)
    assert torch.equal(x.grad, y.grad)


@given(specs, seeds)
def test_codes_are_numpys(spec: QuantSpec, seed: int) -> None:
    torch.manual_seed(seed)
    scale = 10 ** (torch.rand(()) * 4 - 3)
    zero_point = torch.tensor(0.0 if spec.symmetric else float(torch.randint(0, spec.qmax + 1, ())))
    x = away_from_ties(scale, (40,), spec)
    codes = quantize(x, scale, zero_point, spec)
    exact = np.rint(x.double().numpy() / scale.double().item()) + zero_point.item()
    assert np.array_equal(codes.numpy(), np.clip(exact, spec.qmin, spec.qmax))
    real = dequantize(codes, scale, zero_point)
    assert torch.equal(real, fake_quantize(x, scale, zero_point, spec))
    assert torch.equal(quantize(real, scale, zero_point, spec), codes)  # a grid point stays


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_round_in_fp32_and_come_back(dtype: torch.dtype) -> None:
    spec, scale, zero = QuantSpec(4, True), torch.tensor(0.37), torch.tensor(0.0)
    x = torch.randn(50).to(dtype)
    result = fake_quantize(x, scale, zero, spec)
    assert result.dtype == dtype
    assert torch.equal(result, fake_quantize(x.float(), scale, zero, spec).to(dtype))


ends = st.floats(-1e6, 1e6, width=32)


@given(ends, ends)
def test_qparams_are_torch_aos_at_eight_bits_affine(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    observer = MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    observer(torch.tensor([low, high]))
    wanted_scale, wanted_zero = observer.calculate_qparams()
    if wanted_scale.item() <= 2 * torch.finfo(torch.float32).eps:
        return  # theirs is floored at eps
    scale, zero = choose_qparams(torch.tensor([low]), torch.tensor([high]), QuantSpec(8, False))
    torch.testing.assert_close(scale, wanted_scale.reshape(1).float(), rtol=1e-6, atol=0)
    assert abs(zero.item() - wanted_zero.item()) <= 1  # a tie of low / scale may fall either way


@given(specs, st.lists(st.tuples(ends, ends), min_size=1, max_size=5))
def test_range_is_covered_and_zero_exact(spec: QuantSpec, pairs: list[tuple[float, float]]) -> None:
    low = torch.tensor([min(pair) for pair in pairs])
    high = torch.tensor([max(pair) for pair in pairs])
    scale, zero = choose_qparams(low, high, spec)
    assert scale.dtype == zero.dtype == torch.float32
    assert (scale > 0).all() and torch.isfinite(scale).all()
    assert torch.equal(zero, zero.round()) and ((zero >= spec.qmin) & (zero <= spec.qmax)).all()
    assert (fake_quantize(torch.zeros(len(pairs)), scale, zero, spec) == 0).all()
    # The ends are off by no more than half a step (the zero point is rounded), and a rounding.
    reached = [end.clamp(min=0) for end in (low, high)] if spec.symmetric and not spec.signed else [low, high]
    for end in reached:
        error = (fake_quantize(end, scale, zero, spec) - end).abs()
        assert (error <= 0.5 * scale * (1 + 1e-5) + 1e-6 * end.abs()).all()


@given(specs)
def test_all_zero_channel_gets_scale_one(spec: QuantSpec) -> None:
    scale, zero = choose_qparams(torch.zeros(3), torch.zeros(3), spec)
    assert torch.equal(scale, torch.ones(3))
    assert torch.equal(zero, torch.full((3,), 0.0 if spec.symmetric else float(spec.qmin)))


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("axis", [0, -1, None])
def test_channel_view_and_broadcast_agree(shape: tuple[int, ...], axis: int | None) -> None:
    granularity = PerTensor() if axis is None else PerChannel(axis)
    x = torch.randn(shape)
    channels = channel_count(x.shape, granularity)
    rows = channel_view(x, granularity)
    assert rows.shape == (channels, x.numel() // channels)
    values = torch.arange(1.0, channels + 1)
    scaled = channel_view(x * broadcast_channels(values, x.shape, granularity), granularity)
    assert torch.equal(scaled, rows * values[:, None])


def test_grids_in_numbers() -> None:
    bounds = {(spec.qmin, spec.qmax, spec.scheme) for spec in (QuantSpec(4, True), QuantSpec(4, False))}
    assert bounds == {(-8, 7, "symmetric tensor"), (0, 15, "affine tensor")}
    unsigned = QuantSpec(4, True, PerGroup(32), signed=False)
    assert (unsigned.qmin, unsigned.qmax, unsigned.scheme) == (0, 15, "unsigned symmetric group 32")
    for wrong in ({"signed": False, "symmetric": False, "bits": 4}, {"bits": 17, "symmetric": True}):
        with pytest.raises(ValueError, match=r"signed=False|bits=17"):
            QuantSpec(**wrong)
    with pytest.raises(ValueError, match="a group of 0 values"):
        PerGroup(0)


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(shapes, st.integers(-4, 3), st.integers(1, 30))
def test_groups_are_runs_of_each_channel(shape: tuple[int, ...], axis: int, size: int) -> None:
    axis = axis % len(shape) - len(shape) if axis < 0 else axis % len(shape)
    granularity = PerGroup(size, axis)
    x = torch.randn(shape)
    runs = [run for c in range(shape[axis]) for run in x.select(axis, c).reshape(-1).split(size)]
    assert channel_count(x.shape, granularity) == len(runs)
    rows = channel_view(x, granularity)
    filled = channel_view(x, granularity, fill=9.0)
    assert rows.shape == filled.shape == (len(runs), max(map(len, runs)))
    for row, other, run in zip(rows, filled, runs, strict=True):
        assert torch.equal(row[: len(run)], run) and (row[len(run) :] == run[-1]).all()
        assert torch.equal(other[: len(run)], run) and (other[len(run) :] == 9.0).all()
    assert torch.equal(from_channel_view(rows, x.shape, granularity), x)
    values = torch.arange(1.0, len(runs) + 1)
    wide = broadcast_channels(values, x.shape, granularity)
    scaled = channel_view(x * wide, granularity)
    assert torch.equal(scaled, rows * values[:, None])


@given(shapes, st.integers(0, 3), st.lists(st.sampled_from([0, -1, 2, 3, 4, 6, 40]), min_size=1, max_size=4))
def test_values_of_coarse_channels_are_repeated_for_finer_ones(
    shape: tuple[int, ...], axis: int, grains: list[int]
) -> None:
    axis = axis % len(shape)
    kinds = [PerGroup(g, axis) if g > 0 else PerChannel(axis) if g else PerTensor() for g in grains]
    common = common_granularity(kinds)
    for own in kinds:
        values = torch.randn(channel_count(shape, own))
        finer = refine_channels(values, shape, own, common)
        assert finer.shape == (channel_count(shape, common),)
        wide = (broadcast_channels(v, shape, g).expand(shape) for v, g in ((finer, common), (values, own)))
        assert torch.equal(*wide)


def test_channels_along_different_axes_have_no_common_form() -> None:
    with pytest.raises(ValueError, match="different axes"):
        common_granularity([PerChannel(0), PerGroup(4, 1)])

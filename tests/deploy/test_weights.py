"""Stored weights come back to the bit; narrow ones are packed."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqss.arithmetic.weights import coarsen
from dqss.deploy.containers import Container, Held, hold_weight
from dqss.deploy.grids import store
from dqss.deploy.marks import WEIGHT
from dqss.deploy.targets import GENERIC, ONNXRUNTIME_CPU
from dqss.functional import broadcast_channels, channel_count, fake_quantize
from dqss.spec import Granularity, PerChannel, PerGroup, PerTensor, QuantSpec
from tests.deploy.support import OneGrid, lowered, random_grid, run


def on_grid(grid: OneGrid, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    spec = grid.of
    scale = broadcast_channels(grid.scales, shape, spec.granularity)
    zero = broadcast_channels(grid.zero_points, shape, spec.granularity)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale * 2 ** (spec.bits - 2)
    return fake_quantize(noise, scale, zero, spec)


GRAINS: list[tuple[Granularity, tuple[int, ...]]] = [
    (PerTensor(), (3, 5)),
    (PerTensor(), (3, 2, 2, 2)),
    (PerChannel(0), (5, 3)),
    (PerChannel(0), (5, 3, 2, 2)),
    (PerChannel(1), (4, 3, 2, 2)),
    (PerGroup(4, 0), (3, 8)),
    (PerGroup(4, 0), (3, 10)),
    (PerGroup(4, 0), (3, 3, 2, 2)),
    (PerGroup(8, 1), (4, 3, 2, 2)),
]


@settings(max_examples=120, deadline=None)
@given(
    bits=st.integers(2, 16),
    symmetric=st.booleans(),
    grain=st.sampled_from(GRAINS),
    seed=st.integers(0, 10**6),
)
def test_what_is_stored_comes_back(
    bits: int, symmetric: bool, grain: tuple[Granularity, tuple[int, ...]], seed: int
) -> None:
    granularity, shape = grain
    spec = QuantSpec(bits, symmetric, granularity)
    grid = random_grid(spec, channel_count(shape, granularity), seed)
    weight = on_grid(grid, shape, seed)
    data = lowered(WEIGHT, "layer.weight", grid, shape, weight)
    assert np.array_equal(run(data, {}), weight.numpy())
    onnx.checker.check_model(data, full_check=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8])
@pytest.mark.parametrize(("granularity", "channels"), [(PerTensor(), 1), (PerChannel(0), 5)])
def test_a_grid_without_zero_comes_back(bits: int, granularity: Granularity, channels: int) -> None:
    spec = QuantSpec(bits, True, granularity)
    scale = torch.rand(channels) + 0.1
    grid = OneGrid(spec, scale, torch.full((channels,), -0.5))
    codes = torch.randint(spec.qmin, spec.qmax + 1, (5, 7))
    weight = (codes + 0.5) * broadcast_channels(scale, (5, 7), granularity)
    data = lowered(WEIGHT, "layer.weight", grid, (5, 7), weight)
    assert np.array_equal(run(data, {}), weight.numpy())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_up_to_four_bits_take_half_a_byte(bits: int, symmetric: bool) -> None:
    grid = random_grid(QuantSpec(bits, symmetric, PerChannel(0)), 5, 3)
    weight = on_grid(grid, (5, 7), 3)
    (codes,) = [
        entry
        for entry in onnx.load_from_string(
            lowered(WEIGHT, "layer.weight", grid, (5, 7), weight)
        ).graph.initializer
        if entry.name.endswith(".codes")
    ]
    assert codes.data_type == (onnx.TensorProto.INT4 if symmetric else onnx.TensorProto.UINT4)
    assert len(codes.raw_data) == 18  # 35 values
    # Read without any library: the first of two values is in the lower half of its byte.
    halves = np.frombuffer(codes.raw_data, np.uint8)
    values = np.stack([halves & 15, halves >> 4], 1).reshape(-1)[:35].astype(int)
    values = np.where(values > 7, values - 16, values) if symmetric else values
    steps = values.reshape(5, 7).astype(np.float32) - grid.zero_points[:, None].numpy()
    assert np.array_equal(steps * grid.scales[:, None].numpy(), weight.numpy())


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 10**6))
def test_in_a_byte_narrow_weights_stand_at_the_upper_end(bits: int, symmetric: bool, seed: int) -> None:
    spec = QuantSpec(bits, symmetric, PerChannel(0))
    grid, held = random_grid(spec, 4, seed), hold_weight(spec, ONNXRUNTIME_CPU.weight_widths)
    weight = on_grid(grid, (4, 6), seed)
    assert held.shift == 8 - bits
    stored = store(weight, grid.scales, grid.zero_points, spec, held, apart=False)
    zero = np.zeros(4) if stored.zero_point is None else stored.zero_point.astype(np.float32)
    back = (stored.codes.astype(np.float32) - zero[:, None]) * stored.scale[:, None]
    assert np.array_equal(back, weight.numpy())
    assert not np.any(stored.codes.astype(int) % (1 << held.shift))
    data = lowered(WEIGHT, "layer.weight", grid, (4, 6), weight, ONNXRUNTIME_CPU)
    assert np.array_equal(run(data, {}), weight.numpy())


def test_dead_channels_get_coarser_scales_and_others_stay() -> None:
    spec = QuantSpec(8, True, PerChannel(0))
    grid = OneGrid(spec, torch.tensor([0.1, 1e-12, 0.02]), torch.zeros(3))
    weight, least = on_grid(grid, (3, 5), 0), torch.tensor([1e-3, 1e-9, 1e-3])
    coarse, scale = coarsen(weight, grid.scales, least, spec)
    assert bool((scale >= least).all()) and least[1] <= scale[1] < 2 * least[1]
    assert torch.equal(coarse[[0, 2]], weight[[0, 2]]) and torch.equal(scale[[0, 2]], grid.scales[[0, 2]])
    assert float((coarse[1] - weight[1]).abs().max()) <= float(scale[1]) / 2
    store(coarse, scale, grid.zero_points, spec, hold_weight(spec, (8,)), apart=False)


def test_a_weight_off_its_grid_is_refused() -> None:
    spec = QuantSpec(8, True, PerTensor())
    grid = random_grid(spec, 1, 0)
    weight = on_grid(grid, (3, 3), 0)
    weight[1, 1] = torch.nextafter(weight[1, 1], torch.tensor(torch.inf))
    with pytest.raises(ValueError, match="not on its grid"):
        store(weight, grid.scales, grid.zero_points, spec, Held(Container(8, True)), apart=False)


def test_scales_too_small_to_halve_are_refused() -> None:
    spec = QuantSpec(2, True, PerTensor())
    tiny = torch.full((1,), 2e-38)
    with pytest.raises(ValueError, match="too small"):
        store(torch.zeros(2), tiny, torch.zeros(1), spec, hold_weight(spec, (8,)), apart=False)


def test_widths_that_no_target_has() -> None:
    with pytest.raises(ValueError, match="12 bits fit into none of"):
        hold_weight(QuantSpec(12, True), (4, 8))
    assert hold_weight(QuantSpec(12, True), GENERIC.weight_widths).container.name == "int16"

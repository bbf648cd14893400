"""Clip, QuantizeLinear and DequantizeLinear are ``fake_quantize``, to the bit, whoever runs them."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from dqss.deploy.containers import hold_activation
from dqss.deploy.marks import QUANTIZE
from dqss.deploy.targets import GENERIC, ONNXRUNTIME_CPU
from dqss.functional import broadcast_channels, fake_quantize
from dqss.spec import PerChannel, PerTensor, QuantSpec
from tests.deploy.support import OneGrid, lowered, random_grid, run

KINDS = {"affine": (False, True), "symmetric": (True, True), "unsigned": (True, False)}


def hard_values(grid: OneGrid, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Noise, ties between two steps, the ends of the grid and what is beyond, and neighbours of all."""
    spec, generator = grid.of, torch.Generator().manual_seed(seed)
    scale = broadcast_channels(grid.scales, shape, spec.granularity)
    zero = broadcast_channels(grid.zero_points, shape, spec.granularity)
    steps = torch.randint(spec.qmin - 3, spec.qmax + 4, shape, generator=generator) - zero
    kind = torch.randint(0, 4, shape, generator=generator)
    noise = torch.randn(shape, generator=generator) * scale * 2 ** (spec.bits - 1)
    ties = (steps + 0.5) * scale
    near = torch.nextafter(ties, torch.where(steps % 2 == 0, torch.inf, -torch.inf))
    beyond = torch.where(steps % 2 == 0, 1.0, -1.0) * scale * 2**20
    return torch.where(kind == 0, noise, torch.where(kind == 1, ties, torch.where(kind == 2, near, beyond)))


@settings(max_examples=150, deadline=None)
@given(
    bits=st.integers(2, 16),
    kind=st.sampled_from(sorted(KINDS)),
    channels=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_it_is_fake_quantize(bits: int, kind: str, channels: bool, seed: int) -> None:
    symmetric, signed = KINDS[kind]
    spec = QuantSpec(bits, symmetric, PerChannel(-2) if channels else PerTensor(), signed)
    grid, shape = random_grid(spec, 3 if channels else 1, seed), (5, 3, 16)
    x = hard_values(grid, shape, seed)
    wanted = fake_quantize(
        x,
        broadcast_channels(grid.scales, shape, spec.granularity),
        broadcast_channels(grid.zero_points, shape, spec.granularity),
        spec,
    )
    data = lowered(QUANTIZE, "layer.activation", grid, shape)
    assert np.array_equal(run(data, {"x": x}), wanted.numpy())
    onnx.checker.check_model(data, full_check=True)
    found = ReferenceEvaluator(onnx.load_from_string(data)).run(None, {"x": x.numpy()})[0]
    assert np.array_equal(found, wanted.numpy())


@pytest.mark.parametrize("bits", [3, 8, 12, 16])
def test_what_is_far_beyond_saturates(bits: int) -> None:
    # Not in the reference evaluator, which casts to int32 on the way.
    spec, x = QuantSpec(bits, False), torch.tensor([-torch.inf, -1e38, -0.0, 1e38, torch.inf])
    grid = random_grid(spec, 1, bits)
    found = run(lowered(QUANTIZE, "layer.activation", grid, x.shape), {"x": x})
    assert np.array_equal(found, fake_quantize(x, grid.scales, grid.zero_points, spec).numpy())


def test_without_the_clip_it_would_not_be() -> None:
    # What the tests above could overlook: that nothing of a narrow grid ever met its ends.
    spec = QuantSpec(4, False)
    grid = random_grid(spec, 1, 0)
    graph = onnx.load_from_string(lowered(QUANTIZE, "layer.activation", grid, (4,))).graph
    assert graph.node[0].op_type == "Clip"
    x = hard_values(grid, (512,), 0)
    clipped = fake_quantize(x, grid.scales, grid.zero_points, spec)
    assert not torch.equal(clipped, fake_quantize(x, grid.scales, grid.zero_points, QuantSpec(8, False)))


def test_full_grids_need_no_clip() -> None:
    for bits in (8, 16):
        for symmetric, signed in KINDS.values():
            grid = random_grid(QuantSpec(bits, symmetric, signed=signed), 1, 0)
            graph = onnx.load_from_string(lowered(QUANTIZE, "layer.activation", grid, (4,))).graph
            assert [node.op_type for node in graph.node] == ["QuantizeLinear", "DequantizeLinear", "Identity"]


def test_signed_grids_move_where_a_kernel_wants_them_unsigned() -> None:
    spec = QuantSpec(8, True)
    grid, held = random_grid(spec, 1, 1), hold_activation(spec, signed=False)
    assert (held.container.name, held.offset) == ("uint8", 128)
    x = hard_values(grid, (4, 64), 1)
    moved = run(lowered(QUANTIZE, "layer.activation", grid, (4, 64), target=ONNXRUNTIME_CPU), {"x": x})
    assert np.array_equal(
        moved, run(lowered(QUANTIZE, "layer.activation", grid, (4, 64), target=GENERIC), {"x": x})
    )
    assert np.array_equal(moved, fake_quantize(x, grid.scales, grid.zero_points, spec).numpy())

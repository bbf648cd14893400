"""Each integer kernel alone against ONNX Runtime's, to the bit, on every byte or pair of bytes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from torch import Tensor

from dqss.arithmetic.kernels import LayerKernel
from dqss.arithmetic.numbers import Bytes, add, mean
from tests.arithmetic.runtime import run, scalars

scale_of = st.floats(2.0**-10, 2.0**10, width=32)
zero_of = st.integers(0, 255)


@st.composite
def bytes_of(draw: st.DrawFn) -> Bytes:
    return Bytes(torch.tensor(draw(scale_of)), torch.tensor(float(draw(zero_of))))


def values(codes: Tensor, grid: Bytes) -> Tensor:
    return (codes - grid.zero) * grid.scale


def codes(found: Tensor, grid: Bytes) -> np.ndarray:
    return (grid.read(found) + grid.zero).numpy().astype(int)


LEFT, RIGHT = (
    side.reshape(-1).float() for side in torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
)


def added(a: Bytes, b: Bytes, c: Bytes) -> np.ndarray:
    names = ["a", "a_scale", "a_zero", "b", "b_scale", "b_zero", "c_scale", "c_zero"]
    constants = scalars(a, "a") | scalars(b, "b") | scalars(c, "c")
    return run("QLinearAdd", {"a": LEFT, "b": RIGHT}, names, constants, "com.microsoft")


@settings(max_examples=40, deadline=None)
@given(a=bytes_of(), b=bytes_of(), c=bytes_of(), ratio=st.floats(0.05, 20))
def test_sums_of_all_pairs_of_bytes(a: Bytes, b: Bytes, c: Bytes, ratio: float) -> None:
    # The grid of the sum about as wide as the operands': elsewhere everything saturates.
    c = Bytes((torch.maximum(a.scale, b.scale) * ratio).float(), c.zero)
    found = codes(add(values(LEFT, a), values(RIGHT, b), a, b, c), c)
    assert np.array_equal(found, added(a, b, c))


def test_one_rounding_of_product_and_sum_is_what_decides() -> None:
    # Without it the test above would still pass most of the time.
    generator, off = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        scale = torch.randn(3, generator=generator).exp()
        zero = torch.randint(0, 256, (3,), generator=generator).float()
        a, b, c = (Bytes(s, z) for s, z in zip(scale, zero, strict=True))
        wanted = added(a, b, c)
        assert np.array_equal(codes(add(values(LEFT, a), values(RIGHT, b), a, b, c), c), wanted)
        over, under = a.scale / c.scale, b.scale / c.scale
        plain = ((c.zero - (over * a.zero + under * b.zero)) + LEFT * over) + RIGHT * under
        off += int((plain.round().clamp(0, 255).numpy() != wanted).sum())
    assert off > 0


@settings(max_examples=40, deadline=None)
@given(
    a=bytes_of(), c=bytes_of(), ratio=st.floats(0.02, 2), size=st.integers(1, 300), seed=st.integers(0, 10**6)
)
def test_means(a: Bytes, c: Bytes, ratio: float, size: int, seed: int) -> None:
    c = Bytes((a.scale * ratio).float(), c.zero)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (2, 50, size, 1), generator=generator).float()
    constants = scalars(a, "a") | scalars(c, "c")
    names = ["x", "a_scale", "a_zero", "c_scale", "c_zero"]
    wanted = run("QLinearGlobalAveragePool", {"x": x}, names, constants, "com.microsoft", channels_last=0)
    total = a.read(values(x, a)).sum((2, 3), keepdim=True)
    assert np.array_equal(codes(mean(total, size, a, c), c), wanted)


def kernel_of(a: Bytes, c: Bytes | None, seed: int, shape: tuple[int, ...], bias: float) -> LayerKernel:
    """Random weights and biases; ``bias`` in units of the largest sum."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    unit = a.scale * torch.randn(shape[0], generator=generator).exp() * 0.01
    peak = weight.double().abs().flatten(1).sum(1) * 255
    units = (torch.randn(shape[0], generator=generator).double() * peak * bias).round().clamp(-(2**30), 2**30)
    return LayerKernel(weight, a, unit, units, 0, c)


def constants_of(kernel: LayerKernel, a: Bytes) -> dict[str, np.ndarray]:
    assert kernel.bias is not None
    scale = (kernel.unit / a.scale).numpy()
    # What the runtime multiplies itself; a unit that no product gives is of no use here.
    kernel.unit = a.scale * torch.from_numpy(scale)
    found = {"w": kernel.codes.numpy(), "w_scale": scale, "w_zero": np.zeros(len(scale), np.int8)}
    return scalars(a, "a") | found | {"bias": kernel.bias.numpy().astype(np.int32)}


@settings(max_examples=60, deadline=None)
@given(
    a=bytes_of(),
    zero=zero_of,
    seed=st.integers(0, 10**6),
    channels=st.sampled_from([(1, 1), (3, 8), (16, 5), (96, 4)]),
    size=st.sampled_from([1, 3]),
    depthwise=st.booleans(),
    bias=st.sampled_from([0.0, 0.1, 30.0, 1e4]),
)
def test_convolutions(
    a: Bytes, zero: int, seed: int, channels: tuple[int, int], size: int, depthwise: bool, bias: float
) -> None:
    inputs, outputs = channels
    groups = inputs if depthwise else 1
    outputs = inputs if depthwise else outputs
    kernel = kernel_of(a, a, seed, (outputs, inputs // groups, size, size), bias)
    constants = constants_of(kernel, a)
    x = torch.randint(0, 256, (2, inputs, 7, 9), generator=torch.Generator().manual_seed(seed)).float()
    total = kernel(F.conv2d, values(x, a), 1, size // 2, 1, groups)  # on any grid: this tells how wide
    kernel.real = True
    spread = kernel(F.conv2d, values(x, a), 1, size // 2, 1, groups).std()
    c = Bytes((spread / 40).float() if bool(spread > 0) else torch.tensor(1.0), torch.tensor(float(zero)))
    kernel.real, kernel.output_scale, kernel.output_zero = False, c.scale, c.zero
    found = kernel(F.conv2d, values(x, a), 1, size // 2, 1, groups)
    names = ["x", "a_scale", "a_zero", "w", "w_scale", "w_zero", "c_scale", "c_zero", "bias"]
    pads = [size // 2] * 4
    wanted = run("QLinearConv", {"x": x}, names, constants | scalars(c, "c"), pads=pads, group=groups)
    assert np.array_equal(codes(found, c), wanted) and total.shape == found.shape


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_matrix_products(seed: int, real: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, c = (
        Bytes(
            torch.randn((), generator=generator).exp(), torch.randint(0, 256, (), generator=generator) * 1.0
        )
        for _ in range(2)
    )
    kernel = kernel_of(a, None if real else c, seed, (9, 31 + 40 * seed), 0.2)
    constants = constants_of(kernel, a)
    x = torch.randint(0, 256, (17, kernel.codes.shape[1]), generator=generator).float()
    kernel.real = True
    exact = kernel(F.linear, values(x, a))
    names = ["x", "a_scale", "a_zero", "w", "w_scale", "w_zero", "bias"]
    if real:
        kind = TensorProto.FLOAT
        wanted = run("QGemm", {"x": x}, names, constants, "com.microsoft", kind, transB=1)
        assert np.array_equal(exact.numpy(), wanted)
        return
    c = Bytes((exact.std() / 40).float(), c.zero)
    kernel.real, kernel.output_scale, kernel.output_zero = False, c.scale, c.zero
    constants |= scalars(c, "c")
    wanted = run("QGemm", {"x": x}, [*names, "c_scale", "c_zero"], constants, "com.microsoft", transB=1)
    assert np.array_equal(codes(kernel(F.linear, values(x, a)), c), wanted)

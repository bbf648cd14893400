"""The gradient of strided convolutions' inputs against torch's own."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dqss.stem import hasten


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.integers(2, 5),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.tuples(st.integers(8, 20), st.integers(8, 20)),
    st.booleans(),
)
def test_all_gradients_are_torchs(
    channels: int,
    out: int,
    kernel: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    size: tuple[int, int],
    bias: bool,
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, out, kernel, stride, padding, bias=bias).double()
    fast = copy.deepcopy(plain)
    hasten(fast)
    assert "_conv_forward" in vars(fast)
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    found = []
    for layer in (plain, fast):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        torch.manual_seed(1)
        (y * torch.randn_like(y)).sum().backward()
        found.append([y, leaf.grad, layer.weight.grad, *([layer.bias.grad] if bias else [])])
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(8, 4, 3, stride=2),
        nn.Conv2d(3, 4, 3, stride=(2, 1)),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.Conv2d(3, 4, 3, stride=2, dilation=2),
        nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Conv1d(3, 4, 3, stride=2),
    ],
)
def test_others_are_left_alone(layer: nn.Module) -> None:
    hasten(layer)
    assert "_conv_forward" not in vars(layer)

"""Max pooling of turned images against torch's own: the same values, and gradients to the same places."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dqss import pooling
from dqss.pooling import MANY, hasten


def run(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    torch.manual_seed(1)
    (y * torch.randn_like(y)).sum().backward()
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@settings(max_examples=40)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.one_of(st.none(), st.integers(1, 3)),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
)
def test_values_and_gradients_are_torchs(
    kernel: tuple[int, int], stride: int | None, dilation: int, ceil: bool, ties: bool
) -> None:
    padding = (kernel[0] // 2, kernel[1] // 2)
    plain = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil)
    fast = copy.deepcopy(plain)
    hasten(fast)
    torch.manual_seed(0)
    x = torch.randn(2, MANY, 11, 13)
    x = x.round() if ties else x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "_LARGE", 1)
        assert pooling._fits(x)
        for wanted, got in zip(run(plain, x), run(copy.deepcopy(fast), x), strict=True):
            assert torch.equal(got, wanted) and got.is_contiguous()


def test_a_number_that_is_none_stays_one() -> None:
    layer = nn.MaxPool2d(3, 2, 1)
    hasten(layer)
    x = torch.randn(2, 32, 80, 80)
    x[0, 0, 5, 5] = math.nan
    assert pooling._fits(x) and torch.equal(torch.isnan(layer(x)), torch.isnan(nn.MaxPool2d(3, 2, 1)(x)))


@pytest.mark.parametrize(
    "x", [torch.randn(32, 96, 96), torch.randn(1, 8, 200, 200), torch.randn(1, 16, 128, 128).double()]
)
def test_others_go_torchs_way(x: Tensor) -> None:
    layer = nn.MaxPool2d(3, 2, 1)
    hasten(layer)
    assert not pooling._fits(x) and torch.equal(layer(x), nn.MaxPool2d(3, 2, 1)(x))


@pytest.mark.parametrize("layer", [nn.MaxPool2d(2, return_indices=True), nn.AvgPool2d(2), nn.MaxPool1d(2)])
def test_other_layers_stay_as_they_are(layer: nn.Module) -> None:
    hasten(layer)
    assert "forward" not in vars(layer)

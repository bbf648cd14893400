"""Soft rounding against the formulas of arXiv 2004.10568, written again with numpy and math."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqss.functional import choose_qparams, fake_quantize
from dqss.mixing import Codes, Grid
from dqss.repair.rounding import (
    FITTED,
    SoftRounding,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    regularizer,
)
from dqss.spec import MIDDLE, PerChannel, QuantSpec

SPECS = [QuantSpec(bits, symmetric, PerChannel(0)) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


def soft(
    spec: QuantSpec, share: float = 1.0, seed: int = 0, learn_step: bool = False
) -> tuple[torch.Tensor, SoftRounding]:
    """A random weight; with a smaller ``share`` of its range on the grid the rest is clipped."""
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    rows = weight.flatten(1)
    scale, zero_point = choose_qparams(rows.amin(1) * share, rows.amax(1) * share, spec)
    return weight, SoftRounding(weight, Grid(scale, zero_point, spec), learn_step)


def test_rectified_sigmoid_is_equation_23() -> None:
    v = np.linspace(-8, 8, 401)
    wanted = np.minimum(1, np.maximum(0, 1 / (1 + np.exp(-v)) * (1.1 + 0.1) - 0.1))
    np.testing.assert_allclose(rectified_sigmoid(torch.from_numpy(v)).numpy(), wanted, atol=1e-12)
    # Both ends are reached exactly, which no sigmoid does.
    assert rectified_sigmoid(torch.tensor([-4.0, 4.0])).tolist() == [0.0, 1.0]


@given(st.floats(0, 1))
def test_its_inverse(h: float) -> None:
    back = rectified_sigmoid(inverse_rectified_sigmoid(torch.tensor(h, dtype=torch.float64)))
    assert float(back) == pytest.approx(h, abs=1e-9)


@pytest.mark.parametrize("beta", [2.0, 7.3, 20.0])
def test_regularizer_is_equation_24(beta: float) -> None:
    h = [0.0, 0.1, 0.5, 0.77, 1.0]
    wanted = sum(1 - abs(2 * one - 1) ** beta for one in h) / len(h)
    assert float(regularizer(torch.tensor(h, dtype=torch.float64), beta)) == pytest.approx(wanted)
    assert float(regularizer(torch.tensor([0.0, 1.0]), beta)) == 0
    assert math.isclose(float(regularizer(torch.tensor([0.5]), beta)), 1)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.bits} {spec.scheme}")
def test_it_starts_at_the_float_weight_and_rounds_to_the_nearest(spec: QuantSpec) -> None:
    weight, rounding = soft(spec)
    scale, zero_point = rounding.grid.shaped(weight.shape)
    inside = (weight >= scale * (spec.qmin - zero_point)) & (weight <= scale * (spec.qmax - zero_point))
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(rounding(weight)[inside], weight[inside], atol=1e-5, rtol=1e-5)
    nearest = fake_quantize(weight, scale, zero_point, spec)
    assert torch.equal(rounding.codes().dequantize(), nearest)
    assert torch.equal(rounding.codes().integers, Codes.of(weight, rounding.grid).integers)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.bits} {spec.scheme}")
def test_it_starts_near_codes_that_were_fitted(spec: QuantSpec) -> None:
    """Also to those that are not next to the weight: they make up for what others lose."""
    weight, plain = soft(spec)
    moves = torch.randint(-2, 3, weight.shape, generator=torch.Generator().manual_seed(5))
    integers = (Codes.of(weight, plain.grid).integers.int() + moves).clamp(spec.qmin, spec.qmax)
    fitted = Codes.from_integers(integers.float(), plain.grid)
    rounding = SoftRounding(weight, plain.grid, fitted=fitted.integers)
    assert torch.equal(rounding.codes().integers, fitted.integers)
    scale, _ = plain.grid.shaped(weight.shape)
    inside = (integers > spec.qmin) & (integers < spec.qmax)
    distance = (fitted.dequantize() - weight).abs() / scale
    near = inside & (distance < 1)
    assert bool(near.any())
    mostly = torch.lerp(weight, fitted.dequantize(), FITTED)
    torch.testing.assert_close(rounding(weight)[near], mostly[near], atol=1e-5, rtol=1e-5)
    far = inside & (distance > 1)
    assert bool(far.any()) and bool(
        ((rounding(weight) - fitted.dequantize()).abs() <= (1 - FITTED) * scale + 1e-5)[far].all()
    )
    # It can still be learned that the float weight was right: the other code lies on its side.
    with torch.no_grad():
        rounding.v.copy_(torch.where(rounding.h() >= 0.5, -9.0, 9.0))
    other = rounding.codes().dequantize()
    assert bool(((other - weight).abs() <= (fitted.dequantize() - weight).abs() + scale)[inside].all())
    assert bool((((other - fitted.dequantize()) * (weight - fitted.dequantize())) >= 0)[far].all())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.bits} {spec.scheme}")
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_whatever_is_learned_is_a_neighbouring_code(spec: QuantSpec, share: float) -> None:
    weight, rounding = soft(spec, share)
    with torch.no_grad():
        rounding.v.copy_(5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    codes = rounding.codes().integers.int()
    nearest = Codes.of(weight, rounding.grid).integers.int()
    assert (codes - nearest).abs().max() == 1
    assert codes.min() >= spec.qmin and codes.max() <= spec.qmax
    # Hard where it is decided: the soft weight is then the hard one.
    with torch.no_grad():
        rounding.v.copy_(torch.where(rounding.v > 0, 9.0, -9.0))
    assert torch.equal(rounding(weight), rounding.codes().dequantize())
    h = rounding.h()
    assert bool(((h == 0) | (h == 1)).all())


def test_clipped_weights_have_no_gradient() -> None:
    weight, rounding = soft(QuantSpec(3, True, PerChannel(0)), share=0.4)
    rounding(weight).sum().backward()  # type: ignore[no-untyped-call]
    scale, _ = rounding.grid.shaped(weight.shape)
    beyond = (weight / scale < -5) | (weight / scale > 4)
    assert beyond.any() and rounding.v.grad is not None
    assert rounding.v.grad[beyond].abs().max() == 0
    assert (rounding.v.grad[~beyond] != 0).float().mean() > 0.9


@pytest.mark.parametrize("spec", SPECS[2:6], ids=lambda spec: f"{spec.bits} {spec.scheme}")
def test_steps_that_learn(spec: QuantSpec) -> None:
    weight, rounding = soft(spec, learn_step=True)
    torch.testing.assert_close(rounding(weight).sum((1, 2, 3)), soft(spec)[1](weight).sum((1, 2, 3)))
    # What a channel gives grows with its step, in proportion: so that is the gradient of the logarithm.
    rounding(weight).sum().backward()  # type: ignore[no-untyped-call]
    assert rounding.shift.grad is not None
    torch.testing.assert_close(rounding.shift.grad, rounding(weight).detach().sum((1, 2, 3)))
    with torch.no_grad():
        rounding.shift.copy_(torch.linspace(-0.3, 0.3, 6))
        rounding.v.copy_(torch.where(rounding.v > 0, 9.0, -9.0))
    codes = rounding.codes()
    torch.testing.assert_close(codes.grid.scale, rounding.grid.scale * torch.linspace(-0.3, 0.3, 6).exp())
    assert torch.equal(codes.integers, Codes.of(weight, rounding.grid).integers)
    assert torch.equal(rounding(weight), codes.dequantize())


def test_a_zero_point_between_two_codes() -> None:
    """As DoReFa's weights have it: no code is zero, and codes are whole numbers all the same."""
    spec = QuantSpec(3, True, PerChannel(0))
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().amax(1, keepdim=True) / 3.5
    rounding = SoftRounding(weight, Grid(scale[:, 0], torch.full((6,), MIDDLE), spec))
    torch.testing.assert_close(rounding(weight), weight)
    nearest = scale * (torch.floor(weight / scale) + 0.5).clamp(-3.5, 3.5)
    torch.testing.assert_close(rounding.codes().dequantize(), nearest)
    with torch.no_grad():
        rounding.v.copy_(torch.where(rounding.v > 0, 9.0, -9.0))
    assert torch.equal(rounding(weight), rounding.codes().dequantize())

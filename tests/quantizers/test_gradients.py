"""Gradients of what learns, against torch's own, the papers written down anew, and finite differences."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dqss.quantizers import LearnedQuantizer
from dqss.spec import Role
from tests.quantizers.cases import made, tensor

Gradients = dict[str, Tensor]


def ours(quantizer: LearnedQuantizer, x: Tensor, grad: Tensor) -> Gradients:
    """Gradients of x and of each parameter, with the scaling of LSQ's undone."""
    x = x.clone().requires_grad_()
    quantizer.zero_grad()
    quantizer(x).backward(grad)
    assert x.grad is not None
    found = {"x": x.grad}
    for key, parameter in quantizer.named_parameters():
        assert parameter.grad is not None
        found[key] = parameter.grad
    return found


def round_ste(x: Tensor) -> Tensor:
    return x + (torch.round(x) - x).detach()


def unscaled(quantizer: LearnedQuantizer, x: Tensor) -> float:
    """LSQ's factor, as section 2.2 of its paper defines it, for one scale a tensor or channel."""
    images = len(x) if quantizer.role is Role.ACTIVATION else 1
    return math.sqrt(x.numel() / images / quantizer.channels * quantizer.candidate.spec.qmax)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize(("bits", "signed"), [(2, True), (4, True), (3, False), (8, False)])
def test_lsq_is_what_torch_computes(bits: int, signed: bool, role: Role, channels: bool) -> None:
    x, grad = tensor("normal", (6, 5, 7), 0), tensor("normal", (6, 5, 7), 1)
    quantizer = made("lsq", x, role, bits, True, signed, channels)
    spec, axis = quantizer.candidate.spec, 0 if role is Role.WEIGHT else 1
    leaf, step = x.clone().requires_grad_(), quantizer.step.detach().clone().requires_grad_()
    zero = torch.zeros_like(step)
    bounds, factor = (spec.qmin, spec.qmax), 1 / unscaled(quantizer, x)
    if channels:
        theirs = torch._fake_quantize_learnable_per_channel_affine(leaf, step, zero, axis, *bounds, factor)
    else:
        theirs = torch._fake_quantize_learnable_per_tensor_affine(leaf, step, zero, *bounds, factor)
    torch.testing.assert_close(quantizer(x).detach(), theirs.detach())
    # torch lets through what rounds to the last code, where the paper clips before it rounds.
    shape = [1] * x.ndim
    shape[axis] = -1
    place = x / step.detach().reshape(shape if channels else ())
    edge = (place.clamp(*bounds) != place) & (place.round().clamp(*bounds) == place.round())
    assert edge.sum() < 0.2 * x.numel()
    grad = grad.masked_fill(edge, 0.0)
    theirs.backward(grad)
    found = ours(quantizer, x, grad)
    torch.testing.assert_close(found["x"], leaf.grad)
    torch.testing.assert_close(found["step"], step.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("role", Role)
def test_lsq_follows_equation_3(role: Role) -> None:
    x, grad = tensor("normal", (6, 5, 7), 0), tensor("normal", (6, 5, 7), 1)
    quantizer = made("lsq", x, role, 2)
    step = quantizer.step.item()
    wanted, passed = 0.0, torch.zeros_like(x)
    for k, (value, g) in enumerate(zip(x.flatten().tolist(), grad.flatten().tolist(), strict=True)):
        v = value / step
        if v <= -2:
            wanted += -2 * g
        elif v >= 1:
            wanted += g
        else:
            wanted += (round(v) - v) * g
            passed.view(-1)[k] = g
    found = ours(quantizer, x, grad)
    assert found["step"].item() * unscaled(quantizer, x) == pytest.approx(wanted, rel=1e-4)
    assert torch.equal(found["x"], passed)


def reference(
    function: Callable[..., Tensor], x: Tensor, grad: Tensor, **learned: Tensor
) -> tuple[Tensor, Gradients]:
    """Value and gradients of an implementation by autograd, in fp64."""
    leaf = x.double().requires_grad_()
    own = {key: value.detach().double().requires_grad_() for key, value in learned.items()}
    value = function(leaf, **own)
    value.backward(grad.double())
    assert leaf.grad is not None
    found = {"x": leaf.grad.float()}
    for key, part in own.items():
        assert part.grad is not None
        found[key] = part.grad.float()
    return value.detach().float(), found


def check(
    quantizer: LearnedQuantizer, x: Tensor, function: Callable[..., Tensor], scaled: bool, **learned: Tensor
) -> None:
    grad = tensor("normal", tuple(x.shape), 9)
    value, wanted = reference(function, x, grad, **learned)
    found = ours(quantizer, x, grad)
    torch.testing.assert_close(quantizer(x).detach(), value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pop("x"), wanted.pop("x"), rtol=1e-4, atol=1e-5)
    assert set(found) == set(wanted)
    for key, part in found.items():
        factor = unscaled(quantizer, x) if scaled else 1.0
        torch.testing.assert_close(part * factor, wanted[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_plus_is_the_paper_with_a_whole_zero_point(bits: int) -> None:
    x = tensor("normal", (6, 5, 7), 0) + 0.7
    quantizer = made("lsq_plus", x, Role.ACTIVATION, bits, symmetric=False)
    top = quantizer.candidate.spec.qmax

    def paper(x: Tensor, step: Tensor, offset: Tensor) -> Tensor:
        return round_ste(torch.clamp((x - offset) / step, 0, top)) * step + offset

    # At these offsets, multiples of the step, the paper's zero point is whole too.
    check(quantizer, x, paper, True, step=quantizer.step, offset=quantizer.offset)


def test_pact_has_the_gradient_of_its_clip() -> None:
    x = 2 * tensor("normal", (6, 5, 7), 0)
    quantizer = made("pact", x, Role.ACTIVATION, 3, signed=False)
    with torch.no_grad():
        quantizer.alpha.fill_(1.7)

    def paper(x: Tensor, alpha: Tensor) -> Tensor:
        y = 0.5 * (x.abs() - (x - alpha).abs() + alpha)  # eq. 1
        step = (alpha / 7).detach()
        return y + (torch.round(y / step) * step - y).detach()

    check(quantizer, x, paper, False, alpha=quantizer.alpha)
    grad = tensor("normal", (6, 5, 7), 2).double()
    width, alpha = 1e-6, 1.7
    by_difference = [(x.double().clamp(0, alpha + sign * width) * grad).sum() for sign in (1, -1)]
    wanted = (by_difference[0] - by_difference[1]) / (2 * width)
    assert ours(quantizer, x, grad.float())["alpha"].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_pams_passes_through_clipping_and_rescaling() -> None:
    x = 2 * tensor("normal", (6, 5, 7), 0)
    quantizer = made("pams", x, Role.ACTIVATION, 4)
    with torch.no_grad():
        quantizer.alpha.fill_(2.1)

    def paper(x: Tensor, alpha: Tensor) -> Tensor:
        inside = torch.minimum(torch.maximum(x, -alpha * 8 / 7), alpha)  # the lowest code is used
        return round_ste(inside * 7 / alpha) * alpha / 7

    check(quantizer, x, paper, False, alpha=quantizer.alpha)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_dorefa_is_equation_9_times_a_gain(bits: int, channels: bool) -> None:
    x = tensor("normal", (5, 6, 3), 0)
    quantizer = made("dorefa", x, Role.WEIGHT, bits, channels=channels)
    steps = 2**bits - 1

    def paper(x: Tensor, step: Tensor) -> Tensor:
        bent = torch.tanh(x)
        largest = bent.abs().amax((1, 2), keepdim=True) if channels else bent.abs().max()
        place = bent / (2 * largest.detach()) + 0.5
        gain = step.reshape(-1, 1, 1) * steps / 2
        # The gain trains the weights as a constant of the layer's own: the paper has it at 1.
        return (2 * round_ste(place * steps) / steps - 1) * gain

    check(quantizer, x, paper, True, step=quantizer.step)


def test_dorefa_does_not_learn_where_activations_are_clipped() -> None:
    x = 2 * tensor("normal", (6, 5, 7), 0)
    quantizer = made("dorefa", x, Role.ACTIVATION, 3, signed=False)
    assert not list(quantizer.parameters())
    step = quantizer.grid().scale
    grad = torch.ones_like(x)
    inside = (torch.round(x / step) >= 0) & (torch.round(x / step) <= 7)
    assert torch.equal(ours(quantizer, x, grad)["x"], inside.float())


@pytest.mark.parametrize("signed", [True, False])
def test_tqt_multiplies_the_step_s_gradient(signed: bool) -> None:
    x, grad = tensor("normal", (6, 5, 7), 0), tensor("normal", (6, 5, 7), 1)
    quantizer = made("tqt", x, Role.WEIGHT, 3, signed=signed)
    with torch.no_grad():
        quantizer.log2_threshold.fill_(0.4)
    scale = quantizer.grid().scale
    assert scale.item() == (0.5 if signed else 0.25)  # 2^1 / 2^2, 2^1 / 2^3

    bounds = (-4, 3) if signed else (0, 7)
    leaf, step = x.clone().requires_grad_(), scale.clone().requires_grad_()
    torch._fake_quantize_learnable_per_tensor_affine(leaf, step, torch.zeros(1), *bounds, 1.0).backward(grad)
    found = ours(quantizer, x, grad)
    torch.testing.assert_close(found["x"], leaf.grad)
    wanted = step.grad * scale * math.log(2)
    torch.testing.assert_close(found["log2_threshold"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("signed", [True, False])
def test_dsq_has_the_derivative_of_its_staircase(signed: bool) -> None:
    low, high = (-4, 3) if signed else (0, 7)
    x = tensor("normal", (200,), 0).double()
    grad = tensor("normal", (200,), 1).double()
    quantizer = made("dsq", x.float(), Role.WEIGHT, 3, signed=signed)
    step, softness = quantizer.step.item(), quantizer.softness.item()
    place = x / step
    # Away from where pieces of the staircase meet, which have other slopes.
    smooth = (place - place.round()).abs() > 1e-3
    x, grad = x[smooth], grad[smooth]

    def staircase(x: Tensor, step: float, softness: float) -> Tensor:
        """Eq. 3 to 6 of the paper in its own symbols, with l = low * step."""
        k, s = math.log(2 / softness - 1) / step, 1 / (1 - softness)
        x = x.clamp(low * step, high * step)
        i = ((x - low * step) / step).floor().clamp(max=high - low - 1)
        middle = low * step + (i + 0.5) * step
        phi = s * torch.tanh(k * (x - middle))
        return low * step + step * (i + (phi + 1) / 2)

    def slope(function: Callable[[float], Tensor], at: float) -> Tensor:
        width = 1e-7
        return (function(at + width) - function(at - width)) / (2 * width)

    found = ours(quantizer, x.float(), grad.float())
    of_x = slope(lambda d: staircase(x + d, step, softness), 0.0) * grad
    torch.testing.assert_close(found["x"], of_x.float(), rtol=1e-3, atol=1e-3)
    for key, wanted in (
        ("step", slope(lambda s: staircase(x, s, softness), step)),
        ("softness", slope(lambda a: staircase(x, step, a), softness)),
    ):
        value = found[key].item() * unscaled(quantizer, x)
        assert value == pytest.approx((wanted * grad).sum().item(), rel=2e-3, abs=2e-3)

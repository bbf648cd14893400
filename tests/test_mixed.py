"""The efficient convolution: one convolution of two mixtures is the N x M sum, and its gradients."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from dqss.attach import attach_input, attach_weight
from dqss.decision import Decision, Softmax, StraightThroughGumbel
from dqss.layers import describe, input_shape
from dqss.mixed import MixedActivation, MixedWeight, Mode, calibrate_all
from dqss.spec import Candidate, PerChannel, PerGroup, PerTensor, QuantSpec

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, padding=1), (2, 3, 5, 6)),
    "conv2d strided dilated": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=2, dilation=2), (2, 3, 7, 7)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, (1, 3), groups=2), (2, 4, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (2, 4, 5, 5)),
    "conv2d reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 5, 5)),
    "conv2d unbatched": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 3, 4, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 2, 3, stride=2), (2, 3, 5)),
    "transposed2d": (
        lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1),
        (2, 3, 4, 4),
    ),
    "transposed2d grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, dilation=2), (2, 4, 4, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 2, 2), (1, 2, 3, 3, 3)),
    "linear": (lambda: nn.Linear(7, 5), (3, 7)),
    "linear on tokens": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 6)),
    "linear on one vector": (lambda: nn.Linear(6, 4), (6,)),
}


def options(axis: int, groups: bool = False) -> list[Candidate]:
    """Grids of both signs, several bit-widths and granularities, clipping and not."""
    channel = PerChannel(axis)
    if groups:
        return [
            Candidate.of("minmax", QuantSpec(3, True, PerGroup(4, axis))),
            Candidate.of("minmax", QuantSpec(16, False, PerGroup(6, axis))),
            Candidate.of("mse", QuantSpec(2, True, channel, signed=False)),
        ]
    return [
        Candidate.of("minmax", QuantSpec(3, True, channel)),
        Candidate.of("percentile", QuantSpec(4, False, PerTensor()), {"p": 80.0}),
        Candidate.of("mse", QuantSpec(2, False, channel)),
    ]


def attached(
    plain: nn.Module, x: Tensor, groups: bool = False
) -> tuple[nn.Module, MixedWeight, MixedActivation]:
    """A copy of ``plain`` with calibrated mixtures on weight and input, logits not uniform."""
    layer = copy.deepcopy(plain).requires_grad_(False)
    info = describe("layer", layer)
    assert info is not None
    candidates = options(info.weight_axis, groups)
    weight = MixedWeight(candidates, Decision("w", candidates), layer.weight.shape)
    calibrate_all([(weight, weight.found(layer.weight))])
    candidates = options(info.input_axis)[:2]  # N = 3, M = 2
    if groups:  # of which activations know nothing
        signs = (QuantSpec(16, False), QuantSpec(3, True, signed=False))
        candidates = [Candidate.of("mse", spec) for spec in signs]
    activation = MixedActivation(candidates, Decision("a", candidates), input_shape(layer, info))
    attach_weight(layer, weight)
    attach_input(layer, activation)
    activation.mode = Mode.OBSERVE
    layer(x)
    calibrate_all([(activation, activation.found())])
    for quantizer in (weight, activation):
        quantizer.mode = Mode.RELAXED
        nn.init.normal_(quantizer.decision.logits)
    return layer, weight, activation


def explicit_sum(
    plain: nn.Module, weight: MixedWeight, activation: MixedActivation, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_ij alpha_i beta_j layer(R_i(x), Q_j(W))`` in fp64, one layer call a pair; and the logits."""
    double = copy.deepcopy(plain).double()
    logits = [q.decision.logits.detach().double().requires_grad_() for q in (weight, activation)]
    beta, alpha = (torch.softmax(each, 0) for each in logits)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(alpha)):
        real = activation[i](x).double()
        for j in range(len(beta)):
            quantized = weight[j](plain.weight.detach()).double()
            total = total + alpha[i] * beta[j] * functional_call(double, {"weight": quantized}, (real,))
    return total, *logits


def close(found: Tensor, wanted: Tensor) -> None:
    """Both mixtures and the convolution round in fp32: some tens of roundings of the largest value."""
    error = (found.double() - wanted).abs().max()
    assert error <= 64 * torch.finfo(torch.float32).eps * (wanted.abs().max() + 1e-3)


@pytest.mark.parametrize("groups", [False, True], ids=["channels", "groups"])
@pytest.mark.parametrize("kind", LAYERS)
def test_one_convolution_is_the_sum_over_all_pairs(kind: str, groups: bool) -> None:
    make, shape = LAYERS[kind]
    plain, x = make(), torch.randn(shape)
    layer, weight, activation = attached(plain, x, groups)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = layer(x1)
    wanted, b, a = explicit_sum(plain, weight, activation, x2)
    close(ours, wanted)
    assert (ours - plain(x)).abs().max() > 1e-3  # it is no identity
    g = torch.randn_like(ours)
    ours.backward(g)
    wanted.backward(g.double())
    wanted = wanted.detach()
    close(x1.grad, x2.grad.double())
    # <g, y_k> cancels: the bound is that of the terms, not of their sum.
    size = float(g.abs().sum() * wanted.abs().max())
    for decision, logits in ((weight.decision, b), (activation.decision, a)):
        assert (decision.logits.grad - logits.grad).abs().max() <= 1e-6 * size
        assert decision.logits.grad.abs().max() > 0


@pytest.mark.parametrize("groups", [False, True], ids=["channels", "groups"])
@pytest.mark.parametrize("kind", ["conv2d grouped", "transposed2d grouped", "linear on tokens"])
def test_one_hot_mixture_is_the_discrete_layer_bit_for_bit(kind: str, groups: bool) -> None:
    make, shape = LAYERS[kind]
    plain, x = make(), torch.randn(shape)
    layer, weight, activation = attached(plain, x, groups)
    for quantizer in (weight, activation):
        quantizer.decision.relaxation = StraightThroughGumbel()
    for j in range(3):
        for i in range(2):
            for quantizer, index in ((weight, j), (activation, i)):
                with torch.no_grad():
                    quantizer.decision.logits.zero_()[index] = 50.0
                quantizer.mode = Mode.RELAXED
            x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
            mixed = layer(x1)
            weight.mode = activation.mode = Mode.DISCRETE
            discrete = layer(x2)
            fixed = functional_call(plain, {"weight": weight[j](plain.weight.detach())}, (activation[i](x),))
            assert torch.equal(mixed, discrete) and torch.equal(discrete, fixed)
            g = torch.randn_like(mixed)
            mixed.backward(g)
            discrete.backward(g)
            assert torch.equal(x1.grad, x2.grad)


@pytest.mark.parametrize("kind", ["conv2d grouped", "conv2d depthwise", "transposed2d grouped", "linear"])
def test_scales_of_the_weight_lie_along_its_output_channels(kind: str) -> None:
    """Scaling one output channel of the weight scales that channel of the quantized output alone."""
    make, shape = LAYERS[kind]
    plain, x = make(), torch.randn(shape)
    plain.bias = None
    layer, weight, _ = attached(plain, x)
    channels = weight[0].scale.numel()
    factor = 2.0 ** torch.arange(channels)
    axis = weight[0].candidate.spec.granularity.axis
    scaled = copy.deepcopy(plain)
    wide = [1] * plain.weight.ndim
    wide[axis] = -1
    scaled.weight.data *= factor.reshape(wide)
    other, more, activation = attached(scaled, x)
    torch.testing.assert_close(more[0].scale, weight[0].scale * factor)
    weight.mode = more.mode = Mode.DISCRETE
    for q in (weight, more):
        q.decision.assigned = 0
    layer.input_quantizer.mode = activation.mode = Mode.FLOAT
    groups = getattr(plain, "groups", 1) if isinstance(plain, nn.ConvTranspose2d) else 1
    at = 1 if x.ndim > 2 else -1
    out = [1] * layer(x).ndim
    out[at] = -1
    assert torch.equal(other(x), layer(x) * factor.repeat(groups).reshape(out))


def test_per_channel_activation_follows_each_channel() -> None:
    plain, x = nn.Conv2d(3, 2, 1), torch.randn(4, 3, 5, 5) * torch.tensor([1e-3, 1.0, 1e3]).reshape(3, 1, 1)
    _, _, activation = attached(plain, x)
    scale = activation[0].scale
    assert scale.shape == (3,)
    largest = x.abs().amax((0, 2, 3))
    torch.testing.assert_close(scale, largest / 3)  # three bits, symmetric
    error = (activation[0](x) - x).abs().amax((0, 2, 3))
    assert (error <= scale * 0.5001).all()


def test_integers_pass_through_in_every_mode() -> None:
    activation = MixedActivation(options(-1)[1:2], Decision("a", [0]), torch.Size([4]))
    x = torch.arange(4)
    for mode in Mode:
        activation.mode = mode
        assert activation(x) is x
    assert not activation.observed and activation.calls == len(Mode)


def test_weights_are_kept_in_one_byte_a_candidate_up_to_eight_bits_signed() -> None:
    candidates = [Candidate.of("minmax", QuantSpec(bits, True, PerChannel(0))) for bits in (2, 4, 8)]
    weight = MixedWeight(candidates, Decision("w", candidates), torch.Size([5, 7]))
    calibrate_all([(weight, weight.found(torch.randn(5, 7)))])
    assert weight.bytes == 3 * 35


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_grids_stay_fp32_when_the_layer_changes_precision(dtype: torch.dtype) -> None:
    plain, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    layer, weight, activation = attached(plain, x)
    weight.decision.relaxation = activation.decision.relaxation = Softmax(0.5)
    wanted_w, wanted_a = layer.weight.detach().clone(), activation(x)
    before = [weight[j].scale.clone() for j in range(3)] + [activation[i].scale.clone() for i in range(2)]
    layer.to(dtype)
    after = [weight[j].scale for j in range(3)] + [activation[i].scale for i in range(2)]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(after, before, strict=True))
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight, wanted_w.to(dtype))  # the codes were made before
    assert layer(x.to(dtype)).dtype == dtype
    if dtype is torch.float64:
        torch.testing.assert_close(activation(x.double()), wanted_a.double(), rtol=1e-6, atol=1e-6)

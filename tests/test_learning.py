"""Mixtures of quantizers that learn against the sums that they are, in value and in gradient."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqss import quantizers
from dqss.functional import channel_count, channel_view
from dqss.fused import Kernel, fused
from dqss.learning import LEAST_SHARE, mix_learned
from dqss.observers import Statistics
from dqss.quantizers import Quantizer
from dqss.spec import Candidate, PerChannel, PerTensor, QuantSpec, Role

WEIGHTS = ("lsq", "lsq_plus", "dorefa", "dsq", "tqt", "mse")
ACTIVATIONS = ("lsq", "lsq_plus", "pact", "dorefa", "dsq", "tqt", "minmax")


def build(names: list[str], x: Tensor, role: Role, bits: int = 3, channels: bool = False) -> list[Quantizer]:
    """Calibrated on ``x``; every other one with a scale a channel where ``channels``."""
    found = []
    for k, name in enumerate(names):
        axis = 0 if role is Role.WEIGHT else 1
        granularity = PerChannel(axis) if channels and k % 2 == 0 else PerTensor()
        affine = role is Role.ACTIVATION and name == "lsq_plus"
        spec = QuantSpec(bits, not affine, granularity, affine or role is Role.WEIGHT)
        count = channel_count(x.shape, granularity)
        quantizer = quantizers.build(Candidate.of(name, spec), count, role)
        quantizer.calibrate(Statistics.of(channel_view(x, granularity)))
        found.append(quantizer)
    return found


def gradients(y: Tensor, grad: Tensor, x: Tensor, weights: Tensor, own: list[Quantizer]) -> list[Tensor]:
    leaves = [x, weights, *(parameter for quantizer in own for parameter in quantizer.parameters())]
    return list(torch.autograd.grad(y, leaves, grad))


def the_sum(x: Tensor, weights: Tensor, own: list[Quantizer]) -> Tensor:
    """By formulas in plain autograd, one candidate after the other, each on its own view."""
    total = torch.zeros_like(x)
    for k, quantizer in enumerate(own):
        granularity = quantizer.candidate.spec.granularity
        if isinstance(granularity, PerTensor):
            rows = [part.reshape(()) for part in quantizer.learned(x)]
        else:
            wide = [1] * x.ndim
            wide[granularity.axis] = -1
            rows = [part.reshape(wide) for part in quantizer.learned(x)]
        total = total + weights[k] * quantizer.formula(x, *rows)
    return total


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[Quantizer], Tensor, Tensor]:
    role = draw(st.sampled_from(Role))
    known = WEIGHTS if role is Role.WEIGHT else ACTIVATIONS
    names = draw(st.lists(st.sampled_from(known), min_size=1, max_size=5))
    shape = draw(st.sampled_from([(3, 1), (2, 5), (3, 4, 5), (4, 3, 2, 2)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(shape, generator=generator)
    weights = torch.softmax(torch.randn(len(names), generator=generator), 0)
    own = build(names, x, role, draw(st.integers(2, 8)), draw(st.booleans()))
    return own, 1.3 * x, weights


@settings(max_examples=30)
@given(mixtures())
def test_mixture_and_gradients_are_those_of_the_sum(case: tuple[list[Quantizer], Tensor, Tensor]) -> None:
    own, x, weights = case
    x, weights, grad = x.requires_grad_(), weights.requires_grad_(), torch.randn_like(x)
    with fused(False):
        mixed = mix_learned(x, weights, own)
    wanted = the_sum(x, weights, own)
    torch.testing.assert_close(mixed, wanted, rtol=1e-5, atol=1e-6)
    found = gradients(mixed, grad, x, weights, own)
    for ours, theirs in zip(found, gradients(wanted, grad, x, weights, own), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@settings(max_examples=30)
@given(mixtures(), st.integers(0, 4))
def test_one_hot_is_the_candidate(case: tuple[list[Quantizer], Tensor, Tensor], place: int) -> None:
    own, x, weights = case
    place %= len(own)
    x, grad = x.requires_grad_(), torch.randn_like(x)
    one = torch.zeros_like(weights)
    one[place] = 1.0
    one.requires_grad_()
    with fused(False):  # every mixture would be compiled for itself
        _check_one_hot(own, x, one, grad, place)


def _check_one_hot(own: list[Quantizer], x: Tensor, one: Tensor, grad: Tensor, place: int) -> None:
    alone = own[place](x)
    wanted = torch.autograd.grad(alone, [x, *own[place].parameters()], grad)
    every = the_sum(x, one, own)
    of_weights = torch.autograd.grad(every, one, grad)[0]
    for mixed in (mix_learned(x, one, own), mix_learned(x, one, own, place=place)):
        assert torch.equal(mixed, alone)
        found = torch.autograd.grad(mixed, [x, one, *own[place].parameters()], grad)
        assert torch.equal(found[0], wanted[0])
        torch.testing.assert_close(found[1], of_weights, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(found[2:], wanted[1:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_compensated_gradients_are_divided_by_the_weights() -> None:
    x = torch.randn(4, 6, 5)
    own = build(["lsq", "pact", "lsq_plus", "minmax"], x, Role.ACTIVATION)
    weights, grad = torch.tensor([0.6, 0.395, 0.004, 0.001]).requires_grad_(), torch.randn_like(x)
    x.requires_grad_()
    plain = gradients(mix_learned(x, weights, own), grad, x, weights, own)
    found = gradients(mix_learned(x, weights, own, compensate=True), grad, x, weights, own)
    assert torch.equal(plain[0], found[0]) and torch.equal(plain[1], found[1])
    shares = [0.6, 0.395, LEAST_SHARE, LEAST_SHARE]  # lsq_plus has two parameters, minmax none
    for before, after, share in zip(plain[2:], found[2:], shares, strict=True):
        torch.testing.assert_close(after, before / share)
    # As if it were alone, where its weight is above the least.
    alone = torch.autograd.grad(own[1](x), list(own[1].parameters()), grad)[0]
    torch.testing.assert_close(found[3], alone)


def test_static_candidates_keep_their_bits_and_their_gradient() -> None:
    x = torch.randn(7, 33).requires_grad_()
    for symmetric in (True, False):
        quantizer = quantizers.build(Candidate.of("percentile", QuantSpec(3, symmetric), {"p": 90.0}), 1)
        quantizer.calibrate(Statistics.of(x.detach().reshape(1, -1)))
        own = [quantizer]
        assert torch.equal(mix_learned(x, torch.ones(1), own), quantizer(x))
        grad = torch.randn_like(x)
        (ours,) = torch.autograd.grad(mix_learned(x, torch.ones(1), own), x, grad)
        (theirs,) = torch.autograd.grad(quantizer(x), x, grad)
        assert torch.equal(ours, theirs)


def test_half_precision_is_mixed_in_fp32() -> None:
    x = torch.randn(4, 6, 5).to(torch.bfloat16).requires_grad_()
    own = build(["lsq", "pact", "lsq_plus"], x.detach().float(), Role.ACTIVATION)
    weights, grad = torch.tensor([0.5, 0.3, 0.2]).requires_grad_(), torch.randn(4, 6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mix_learned(x, weights, own)
    wide = x.detach().float().requires_grad_()
    wanted = mix_learned(wide, weights, own)
    assert torch.equal(mixed, wanted.to(torch.bfloat16))
    narrow = grad.to(torch.bfloat16)
    found = gradients(mixed, narrow, x, weights, own)
    for ours, theirs in zip(found, gradients(wanted, narrow.float(), wide, weights, own), strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype))


def test_nothing_is_kept_for_every_candidate() -> None:
    x = torch.randn(8, 16, 16, 16).requires_grad_()
    own = build(list(ACTIVATIONS), x.detach(), Role.ACTIVATION)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with fused(False), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mix_learned(x, torch.full((len(own),), 1 / len(own), requires_grad=True), own)
    assert x.untyped_storage().data_ptr() in kept
    assert sum(kept.values()) < x.untyped_storage().nbytes() + 4096


RESNET20_WEIGHTS = [
    (16, 3, 3, 3),
    (16, 16, 3, 3),
    (32, 16, 3, 3),
    (32, 32, 3, 3),
    (64, 32, 3, 3),
    (64, 64, 3, 3),
]
RESNET20_WEIGHTS += [(10, 64)]


def test_compiled_once_for_all_shapes_of_a_network() -> None:
    """One tuple of formulas: two forms (value and gradients) for all weights, whatever their sizes."""
    torch._dynamo.utils.counters.clear()
    for shape in RESNET20_WEIGHTS:
        x = 0.1 * torch.randn(shape)
        own = build(["lsq", "dorefa", "mse"], x, Role.WEIGHT)
        weights, grad = torch.tensor([0.5, 0.3, 0.2]).requires_grad_(), torch.randn(shape)
        x.requires_grad_()
        mixed = mix_learned(x, weights, own)
        found = gradients(mixed, grad, x, weights, own)
        with fused(False):
            wanted = mix_learned(x, weights, own)
            others = gradients(wanted, grad, x, weights, own)
        torch.testing.assert_close(mixed, wanted, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(found, others, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert not Kernel.broken
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert counted <= 4, counted


def test_sums_in_pieces_are_the_whole_sums() -> None:
    x = torch.randn(3, 4, 2048)  # per tensor six pieces
    own = build(["lsq", "pact", "lsq_plus"], x, Role.ACTIVATION)
    x, weights, grad = x.requires_grad_(), torch.full((3,), 1 / 3).requires_grad_(), torch.randn(x.shape)
    with fused(False):
        found = gradients(mix_learned(x, weights, own), grad, x, weights, own)
    wanted = gradients(the_sum(x, weights, own), grad, x, weights, own)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)

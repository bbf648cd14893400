"""The fused mixtures against the sums that they are, in value and in gradient."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from dqss import fused
from dqss.decision import StraightThroughGumbel
from dqss.functional import fake_quantize
from dqss.mixing import Codes, CodeStack, Grid, mix_codes, mix_fake_quantize, mix_fake_quantize_reference
from dqss.spec import Granularity, PerChannel, PerGroup, PerTensor, QuantSpec


def spread(values: Tensor, shape: tuple[int, ...], granularity: Granularity) -> Tensor:
    """The value that each element of a tensor is quantized with, one channel after the other."""
    if isinstance(granularity, PerTensor):
        return values.expand(shape)
    out, left = torch.empty(shape), iter(values)
    for c in range(shape[granularity.axis]):
        channel = out.select(granularity.axis, c)
        size = granularity.size if isinstance(granularity, PerGroup) else channel.numel()
        parts = torch.empty(channel.numel()).split(size)
        channel.copy_(torch.cat([next(left).expand(len(part)) for part in parts]).view(channel.shape))
    assert next(left, None) is None
    return out


def rounded(x: Tensor, grid: Grid) -> Tensor:
    """``x`` on one grid, by torch functions that are tested on their own."""
    scale, zero_point = (spread(v, x.shape, grid.spec.granularity) for v in (grid.scale, grid.zero_point))
    return fake_quantize(x, scale, zero_point, grid.spec)


SCHEMES = {"symmetric": (True, True), "unsigned": (True, False), "affine": (False, True)}


@dataclass
class Case:
    """A tensor and K grids for it: bits, scheme, and 0 (tensor), -1 (channel) or a size of groups."""

    shape: tuple[int, ...]
    axis: int
    kinds: list[tuple[int, str, int]]
    decades: float
    seed: int
    dtype: torch.dtype

    def build(self) -> tuple[Tensor, Tensor, list[Grid]]:
        torch.manual_seed(self.seed)
        grids = []
        for bits, scheme, grain in self.kinds:
            axis = self.axis % len(self.shape)
            granularity: Granularity = PerTensor() if not grain else PerChannel(axis)
            granularity = PerGroup(grain, axis) if grain > 0 else granularity
            symmetric, signed = SCHEMES[scheme]
            spec = QuantSpec(bits, symmetric, granularity, signed)
            inner = math.prod(self.shape) // self.shape[axis]
            channels = self.shape[axis] * (math.ceil(inner / grain) if grain > 0 else 1) if grain else 1
            scale = 10 ** (torch.rand(channels) - 1 + self.decades)
            zero = (
                torch.zeros(channels) if symmetric else torch.randint(0, spec.qmax + 1, (channels,)).float()
            )
            grids.append(Grid(scale, zero, spec))
        x = (3 * torch.randn(self.shape)).to(self.dtype)
        return x, torch.softmax(torch.randn(len(grids)), 0), grids


kinds = st.tuples(
    st.integers(2, 8) | st.sampled_from([12, 16]),
    st.sampled_from(sorted(SCHEMES)),
    st.sampled_from([0, -1, -1, 1, 3, 4, 6, 100]),
)
cases = st.builds(
    Case,
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    axis=st.integers(0, 3),
    kinds=st.lists(kinds, min_size=1, max_size=4),
    decades=st.sampled_from([0.0, 0.0, 0.0, -2.0, 1.0]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
)
degenerate = [
    Case((3, 4), 0, [(4, "symmetric", 0), (4, "affine", -1)], -30.0, 1, torch.float32),  # all clipped
    Case((3, 4), 0, [(4, "symmetric", 0), (4, "affine", -1)], 30.0, 2, torch.float32),  # all zero
]


@given(cases)
@example(degenerate[0])
@example(degenerate[1])
def test_mixture_is_the_sum(case: Case) -> None:
    x, weights, grids = case.build()
    g = torch.randn(case.shape).to(case.dtype)
    x1, w1 = x.clone().requires_grad_(), weights.clone().requires_grad_()
    x2, w2 = x.clone().requires_grad_(), weights.clone().requires_grad_()
    ours = mix_fake_quantize(x1, w1, grids)
    # Half-precision inputs are mixed in fp32 and rounded once.
    wide = mix_fake_quantize_reference(x2.float(), w2, grids)
    assert ours.dtype == case.dtype and ours.shape == x.shape
    # K products and sums in fp32: a few roundings of the largest term, and one of the dtype.
    terms = torch.stack([rounded(x.float(), q).abs() for q in grids])
    bound = 4 * len(grids) * torch.finfo(torch.float32).eps * terms.amax(0)
    bound = bound + torch.finfo(case.dtype).eps * wide.detach().abs()
    fits = terms.amax(0) < torch.finfo(case.dtype).max
    assert ((ours.float() - wide).abs() <= bound)[fits].all()
    ours.backward(g)
    wide.backward(g.float())
    torch.testing.assert_close(x1.grad, x2.grad, rtol=2 * torch.finfo(case.dtype).eps, atol=1e-6)
    size = (g.float().abs() * terms).flatten(1).sum(1)
    assert ((w1.grad - w2.grad).abs() <= 1e-5 * size).all()


@given(cases)
def test_gradient_of_weights_is_the_inner_product(case: Case) -> None:
    x, weights, grids = case.build()
    x, g = x.float(), torch.randn(case.shape)
    weights.requires_grad_()
    mix_fake_quantize(x, weights, grids).backward(g)
    for k, grid in enumerate(grids):
        wide = (spread(v, case.shape, grid.spec.granularity) for v in (grid.scale, grid.zero_point))
        scale, zero = (v.numpy() for v in wide)
        codes = np.clip(np.rint(x.numpy() / scale) + zero, grid.spec.qmin, grid.spec.qmax)
        terms = g.double().numpy() * (codes - zero).astype(np.float64) * scale
        assert abs(weights.grad[k].item() - terms.sum()) <= 1e-5 * np.abs(terms).sum()


@given(cases)
def test_one_hot_is_exactly_that_candidate(case: Case) -> None:
    x, _, grids = case.build()
    g = torch.randn(case.shape).to(case.dtype)
    for k, grid in enumerate(grids):
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        mixed = mix_fake_quantize(x1, torch.eye(len(grids))[k], grids)
        alone = rounded(x2, grid)
        assert torch.equal(mixed, alone)
        mixed.backward(g)
        alone.backward(g)
        assert torch.equal(x1.grad, x2.grad)


@given(cases)
def test_straight_through_sample_is_exactly_one_candidate(case: Case) -> None:
    x, _, grids = case.build()
    logits, noise = torch.randn(len(grids), requires_grad=True), torch.randn(len(grids))
    k = int((logits + noise).argmax())
    weights = StraightThroughGumbel(0.7).weights(logits, noise, k)
    mixed = mix_fake_quantize(x, weights, grids)
    assert torch.equal(mixed, rounded(x, grids[k]))
    # ... while the gradient is that of the soft sample.
    mixed.float().sum().backward()
    parts = torch.stack([rounded(x, q).float().sum() for q in grids])
    soft = logits.detach().requires_grad_()
    (torch.softmax((soft + noise) / 0.7, 0) * parts).sum().backward()
    torch.testing.assert_close(logits.grad, soft.grad, rtol=1e-3, atol=1e-3 * float(parts.abs().max() + 1))


@given(cases)
def test_the_known_place_of_a_one_hot_changes_neither_value_nor_gradient(case: Case) -> None:
    x, _, grids = case.build()
    g = torch.randn(case.shape)
    codes = packed(x, grids)
    # Sums multiply by 1 / scale: next to a tie an element may be counted one step further.
    ties = torch.stack([(near_tie(x, grid) * g.abs() * step_of(x, grid)).sum() for grid in grids])
    size = torch.stack([(rounded(x.float(), grid) * g).abs().sum() for grid in grids])
    for k in range(len(grids)):
        found = []
        for place in (None, k):
            x1, w1 = x.clone().requires_grad_(), torch.eye(len(grids))[k].requires_grad_()
            w2 = torch.eye(len(grids))[k].requires_grad_()
            activation, weight = mix_fake_quantize(x1, w1, grids, place), mix_codes(w2, codes, place)
            activation.backward(g.to(case.dtype))
            weight.backward(g)
            assert w1.grad is not None
            found.append([activation, weight, x1.grad, w2.grad, w1.grad])
        assert all(torch.equal(a, b) for a, b in zip(found[0][:-1], found[1][:-1], strict=True))
        assert ((found[0][-1] - found[1][-1]).abs() <= 1.01 * ties + 1e-5 * size).all()


def step_of(x: Tensor, grid: Grid) -> Tensor:
    return spread(grid.scale, x.shape, grid.spec.granularity)


def near_tie(x: Tensor, grid: Grid) -> Tensor:
    """Whether the last bits of a quotient may decide which way an element is rounded."""
    quotient = x.double() / step_of(x, grid).double()
    distance = (quotient - quotient.floor() - 0.5).abs()
    return distance <= 1e-6 * quotient.abs().clamp(min=1)


def packed(x: Tensor, grids: list[Grid]) -> list[Codes]:
    return [Codes.of(x, grid) for grid in grids]


@given(cases)
def test_mixture_of_codes_is_the_sum(case: Case) -> None:
    x, weights, grids = case.build()
    x = x.float()
    codes = packed(x, grids)
    w1, w2 = weights.clone().requires_grad_(), weights.clone().double().requires_grad_()
    g = torch.randn(case.shape)
    ours = mix_codes(w1, codes)
    parts = torch.stack([rounded(x, q) for q in grids]).double()
    wanted = (w2.reshape(-1, *[1] * x.ndim) * parts).sum(0)
    assert ours.dtype == torch.float32 and ours.shape == x.shape
    assert ((ours - wanted).abs() <= 1e-6 * len(grids) * parts.abs().amax(0)).all()
    ours.backward(g)
    wanted.backward(g.double())
    assert ((w1.grad - w2.grad).abs() <= 1e-5 * (g.abs() * parts.abs()).flatten(1).sum(1)).all()
    for k in range(len(grids)):
        assert torch.equal(mix_codes(torch.eye(len(grids))[k], codes), parts[k].float())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bits", [2, 4, 7, 8, 9, 12, 16])
def test_codes_at_rest_are_exact_and_small(bits: int, scheme: str) -> None:
    symmetric, signed = SCHEMES[scheme]
    spec = QuantSpec(bits, symmetric, signed=signed)
    scale, zero = torch.tensor([0.013]), torch.tensor([0.0 if symmetric else 3.0])
    x = torch.linspace(2 * spec.qmin * 0.013 - 1, 2 * spec.qmax * 0.013, 999)
    (codes,) = packed(x, [Grid(scale, zero, spec)])
    assert codes.integers.min() == spec.qmin and codes.integers.max() == spec.qmax
    assert bits > 8 or codes.integers.element_size() == 1
    assert torch.equal(codes.dequantize(), fake_quantize(x, scale, zero, spec))
    assert torch.equal(mix_codes(torch.ones(1), [codes]), codes.dequantize())


KINDS = [(4, "symmetric", -1), (3, "affine", 0), (2, "affine", -1)]
LARGE = Case((3, 5, 400), 1, KINDS, 0.0, 7, torch.float32)
GROUPS = [(4, "unsigned", 128), (16, "affine", 0), (3, "symmetric", 96)]
GROUPED = Case((3, 5, 400), 1, GROUPS, 0.0, 7, torch.float32)
"""Above :data:`dqss.fused.SMALL`, so that the compiled kernels run."""


LONG = Case((2, 3, 2304), 0, [(8, "symmetric", -1), (8, "affine", 0)], 0.0, 7, torch.float32)
"""Channels of 6,912 weights: sums of them are made in pieces."""


def everything(case: Case) -> dict[str, Tensor]:
    """Every value and gradient of both mixtures: soft, one-hot, and one-hot at a known place."""
    x, soft, grids = case.build()
    g, found = torch.randn(case.shape), dict[str, Tensor]()
    hot = torch.eye(len(grids))
    kinds: dict[str, tuple[Tensor, int | None]] = {"soft": (soft, None)}
    kinds |= {f"hot{k}": (row, None) for k, row in enumerate(hot)}
    kinds |= {f"drawn{k}": (row, k) for k, row in enumerate(hot)}
    for name, (weights, place) in kinds.items():
        x1, w1, w2 = (leaf.clone().requires_grad_() for leaf in (x, weights, weights))
        mixed = mix_fake_quantize(x1, w1, grids, place)
        weight = mix_codes(w2, packed(x, grids), place)
        (mixed * g).sum().backward()
        (weight * g).sum().backward()
        parts = {
            "mixed": mixed,
            "weight": weight,
            "x": x1.grad,
            "w of mixed": w1.grad,
            "w of weight": w2.grad,
        }
        found |= {f"{name}: {key}": value.detach() for key, value in parts.items() if value is not None}
    return found


@pytest.mark.parametrize("case", [LARGE, GROUPED, LONG], ids=["channels", "groups", "long"])
def test_fused_kernels_do_what_the_eager_ones_do(case: Case) -> None:
    size = torch.Size(case.shape).numel()
    assert size >= fused.SMALL
    with fused.fused(False):
        wanted = everything(case)
    with fused.fused(True):
        found = everything(case)
    for name, value in wanted.items():
        if "soft" in name or "w of" in name:
            # Sums in another order; products may be fused with them.
            bound = 1e-6 * size**0.5 * float(value.abs().max()) if "w of" in name else 1e-5
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=bound)
        else:
            assert torch.equal(found[name], value), name


def test_every_loop_is_called_directly_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler takes for an input of its own, a number from elsewhere say, keeps it from that."""

    def forbidden(self: fused.Kernel, key: object, args: object) -> None:
        raise AssertionError(f"{self.eager.__name__} went the long way")

    with fused.fused(True):
        wanted = everything(LARGE)
        monkeypatch.setattr(fused.Kernel, "_compiled", forbidden)
        found = everything(LARGE)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_without_a_compiler_the_eager_kernels_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with fused.fused(False):
        wanted = everything(LARGE)

    def missing(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler found\n" + 40 * "many more lines\n")

    kernel = type(fused.mix)
    monkeypatch.setattr(kernel, "broken", False)
    kernels = [value for value in vars(fused).values() if isinstance(value, kernel)]
    assert len(kernels) == 11
    for one in kernels:
        monkeypatch.setattr(one, "compiled", missing)
        monkeypatch.setattr(one, "_direct", {})
    with fused.fused(True), pytest.warns(UserWarning, match="no C.. compiler found$") as caught:
        found = everything(LARGE)
    assert len(caught) == 1
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("ends", "kind"),
    [
        ((-128, 127), torch.int8),
        ((-129, 0), torch.int16),
        ((0, 128), torch.int16),
        ((0, 40_000), torch.int32),
    ],
)
def test_stacked_codes_take_the_smallest_type_that_holds_them(
    ends: tuple[int, int], kind: torch.dtype
) -> None:
    """-128 fits into a byte, as every signed weight of eight bits does."""
    grid = Grid(torch.ones(1), torch.zeros(1), QuantSpec(16, symmetric=True))
    stack = CodeStack.of([Codes(torch.tensor([ends], dtype=torch.int32), grid)])
    assert stack.steps.dtype == kind and stack.steps.flatten().tolist() == list(ends)
    assert stack.choose(0).tolist() == [list(map(float, ends))]

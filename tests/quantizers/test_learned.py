"""What every quantizer that learns promises, on any data."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dqss import quantizers
from dqss.errors import SearchSpaceError
from dqss.functional import channel_count, fake_quantize
from dqss.fused import fused
from dqss.mixing import Grid
from dqss.observers import ALGORITHMS
from dqss.quantizers import LearnedQuantizer, StaticQuantizer
from dqss.quantizers.learned import LEAST
from dqss.spec import Candidate, PerChannel, PerGroup, PerTensor, QuantSpec, Role
from tests.quantizers.cases import ALLOWED, cases, made, tensor


def check_grid(grid: Grid) -> None:
    assert torch.isfinite(grid.scale).all() and (grid.scale > 0).all()
    whole = grid.zero_point == grid.zero_point.round()
    assert (whole | (grid.zero_point == -0.5)).all()
    assert ((grid.zero_point >= grid.spec.qmin) & (grid.zero_point <= grid.spec.qmax)).all()


@given(cases())
def test_codes_give_what_training_saw(case: tuple[LearnedQuantizer, Tensor]) -> None:
    quantizer, x = case
    wide = 3 * x + 0.1  # also what calibration did not see
    for values in (x, wide):
        codes = quantizer.codes(values)
        check_grid(codes.grid)
        integers = codes.integers.to(torch.int32)
        assert integers.min() >= codes.grid.spec.qmin and integers.max() <= codes.grid.spec.qmax
        assert torch.equal(codes.dequantize(), quantizer(values).detach())


@given(cases())
def test_values_are_the_nearest_of_the_grid(case: tuple[LearnedQuantizer, Tensor]) -> None:
    """The nearest one, clipped, for all but DoReFa's weights, which are bent before."""
    quantizer, x = case
    if quantizer.name == "dorefa" and quantizer.role is Role.WEIGHT:
        return
    grid = quantizer.grid()
    scale, zero_point = grid.shaped(x.shape)
    distance = ((quantizer(x).detach() - fake_quantize(x, scale, zero_point, grid.spec)) / scale).abs()
    place = x / scale
    tie = ((place - place.floor()) - 0.5).abs() <= 1e-6 * place.abs().clamp(min=1)
    assert (distance[~tie] < 1e-3).all() and (distance < 1.001).all()


@given(cases())
def test_a_grid_is_taken_back_to_the_bit(case: tuple[LearnedQuantizer, Tensor]) -> None:
    quantizer, x = case
    grid = quantizer.grid()
    again = quantizers.build(quantizer.candidate, quantizer.channels, quantizer.role)
    again.load_grid(grid.scale, grid.zero_point)
    found = again.grid()
    assert torch.equal(found.scale, grid.scale) and torch.equal(found.zero_point, grid.zero_point)
    assert torch.equal(again(x), quantizer(x))


@given(cases(), st.sampled_from([0.0, -1.0, -1e30, 1e-30]))
def test_no_step_of_an_optimizer_ends_below_zero(case: tuple[LearnedQuantizer, Tensor], value: float) -> None:
    quantizer, x = case
    start = quantizer.grid().scale.clone()
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.fill_(value)
    quantizer.constrain_()
    check_grid(quantizer.grid())
    # A power of two is rounded upwards, so up to twice the floor; a threshold of 0 or more is no floor.
    if quantizer.name != "tqt" and list(quantizer.parameters()) and value <= 0:
        torch.testing.assert_close(quantizer.grid().scale, start * LEAST)
    assert torch.isfinite(quantizer(x)).all() and not quantizer.broken()


@pytest.mark.parametrize(("name", "role", "symmetric", "signed"), ALLOWED)
def test_what_is_not_finite_is_noticed(name: str, role: Role, symmetric: bool, signed: bool) -> None:
    quantizer = made(name, tensor("normal", (4, 6), 0), role, 4, symmetric, signed)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    for bad in (torch.nan, torch.inf):
        for parameter in quantizer.parameters():
            with torch.no_grad():
                parameter.fill_(bad)
            quantizer.constrain_()
            # A bound may mend what is infinite; nothing mends NaN.
            mended = bad == torch.inf and bool(torch.isfinite(parameter).all())
            assert quantizer.broken() != mended
            quantizer.load_state_dict(before)
            assert not quantizer.broken()


@pytest.mark.parametrize(("name", "role", "symmetric", "signed"), ALLOWED)
def test_parameters_stay_fp32_and_have_their_shape_from_the_start(
    name: str, role: Role, symmetric: bool, signed: bool
) -> None:
    spec = QuantSpec(3, symmetric, PerChannel(0), signed)
    fresh = quantizers.build(Candidate.of(name, spec), 4, role)
    shapes = {key: value.shape for key, value in fresh.state_dict().items()}
    x = tensor("normal", (4, 4, 2), 1)
    quantizer = made(name, x, role, 3, symmetric, signed, channels=True)
    assert {key: value.shape for key, value in quantizer.state_dict().items()} == shapes
    assert set(shapes.values()) == {torch.Size([4])}
    quantizer.to(torch.bfloat16)
    assert all(value.dtype == torch.float32 for value in quantizer.state_dict().values())
    narrow = x.to(torch.bfloat16).requires_grad_()
    given_back = quantizer(narrow)
    assert given_back.dtype == torch.bfloat16
    assert torch.equal(given_back, quantizer(narrow.detach().float()).to(torch.bfloat16))
    given_back.sum().backward()
    assert narrow.grad is not None and narrow.grad.dtype == torch.bfloat16
    for parameter in quantizer.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32


@pytest.mark.parametrize(("name", "role", "symmetric", "signed"), ALLOWED)
def test_an_empty_batch_passes(name: str, role: Role, symmetric: bool, signed: bool) -> None:
    if role is Role.WEIGHT:
        return
    quantizer = made(name, tensor("normal", (4, 6), 0), role, 4, symmetric, signed)
    x = torch.empty(0, 6, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 6)


REFUSED = [
    (
        "lsq",
        Role.WEIGHT,
        QuantSpec(4, False),
        "lsq has no zero point: use weight_symmetric=true, or lsq_plus",
    ),
    ("tqt", Role.ACTIVATION, QuantSpec(4, False), "use activation_symmetric=true, or lsq_plus"),
    ("pact", Role.WEIGHT, QuantSpec(4, True, signed=False), "clips activations: use lsq or dorefa"),
    ("pact", Role.ACTIVATION, QuantSpec(4, True), "activation_signed=false"),
    ("pams", Role.ACTIVATION, QuantSpec(4, True, signed=False), "activation_signed=true"),
    ("dorefa", Role.ACTIVATION, QuantSpec(4, True), "activation_signed=false"),
    ("dorefa", Role.WEIGHT, QuantSpec(4, False), "weight_symmetric=true"),
    ("lsq_plus", Role.WEIGHT, QuantSpec(4, False), "weight_symmetric=true"),
    ("lsq", Role.WEIGHT, QuantSpec(4, True, PerGroup(8)), "use the granularity tensor or channel"),
]


@pytest.mark.parametrize(("name", "role", "spec", "way_out"), REFUSED)
def test_what_it_is_not_for_is_refused_with_the_way_out(
    name: str, role: Role, spec: QuantSpec, way_out: str
) -> None:
    with pytest.raises(SearchSpaceError, match=way_out) as caught:
        quantizers.build(Candidate.of(name, spec), 1, role)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_names_and_parameters_are_checked() -> None:
    spec = QuantSpec(4, True, signed=False)
    with pytest.raises(SearchSpaceError, match=r"unknown algorithm 'lsqq' \(did you mean 'lsq'\?\)"):
        quantizers.build(Candidate.of("lsqq", spec), 1)
    with pytest.raises(SearchSpaceError, match=r"'pact' has no parameter 'q'.*it takes: p"):
        quantizers.build(Candidate.of("pact", spec, {"q": 1.0}), 1)
    with pytest.raises(SearchSpaceError, match="p=0 is not a percentage"):
        quantizers.build(Candidate.of("pact", spec, {"p": 0.0}), 1)


def test_learned_and_static_names_are_apart() -> None:
    assert set(quantizers.learned_algorithms()).isdisjoint(ALGORITHMS)
    assert quantizers.learns(Candidate.of("lsq", QuantSpec(4, True)))
    assert not quantizers.learns(Candidate.of("mse", QuantSpec(4, True)))
    assert isinstance(quantizers.build(Candidate.of("mse", QuantSpec(4, True)), 1), StaticQuantizer)


@pytest.mark.parametrize("shape", [(6, 5, 4, 4), (7, 5)])
def test_fused_and_eager_agree(shape: tuple[int, ...]) -> None:
    assert channel_count(shape, PerTensor()) == 1
    x = tensor("normal", shape, 3)
    quantizer = made("lsq", x)
    with fused(False):
        eager = quantizer(x)
    assert torch.equal(quantizer(x), eager)

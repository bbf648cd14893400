"""Where quantizers that learn begin, against the papers' formulas in numpy."""

import math

import numpy as np
import pytest
import torch

from dqss.functional import fake_quantize
from dqss.quantizers import learned_algorithms
from dqss.spec import Role
from tests.quantizers.cases import ALLOWED, made, tensor


@pytest.mark.parametrize("binned", [False, True])
@pytest.mark.parametrize(("bits", "signed"), [(2, True), (4, True), (4, False)])
def test_lsq(bits: int, signed: bool, binned: bool) -> None:
    x = tensor("normal", (5, 3000), 0)
    quantizer = made("lsq", x, Role.WEIGHT, bits, True, signed, channels=True, binned=binned)
    seen = x.numpy() if signed else np.maximum(x.numpy(), 0)
    top = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    wanted = 2 * np.abs(seen).mean(1) / math.sqrt(top)
    np.testing.assert_allclose(quantizer.step.detach().numpy(), wanted, rtol=1e-3 if binned else 1e-5)


@pytest.mark.parametrize("bits", [2, 4])
def test_lsq_plus_weights(bits: int) -> None:
    x = tensor("normal", (5, 300), 0) + torch.linspace(-1, 1, 5)[:, None]
    quantizer = made("lsq_plus", x, Role.WEIGHT, bits, channels=True)
    mean, std = x.numpy().mean(1), x.numpy().std(1)
    wanted = np.maximum(np.abs(mean - 3 * std), np.abs(mean + 3 * std)) / 2 ** (bits - 1)
    np.testing.assert_allclose(quantizer.step.detach().numpy(), wanted, rtol=1e-5)


def test_lsq_plus_activations_have_the_least_squared_error() -> None:
    x = tensor("normal", (400, 3), 0).exp() - 0.3
    quantizer = made("lsq_plus", x, Role.ACTIVATION, 3, symmetric=False)

    def error(step: float, offset: float) -> float:
        codes = np.clip(np.round(x.numpy() / step) + np.round(-offset / step), 0, 7)
        return float(np.square((codes - np.round(-offset / step)) * step - x.numpy()).mean())

    found = error(quantizer.step.item(), quantizer.offset.item())
    steps, places = np.linspace(0.05, 3, 300), range(8)
    best = min(error(step, -place * step) for step in steps for place in places)
    assert found <= best * 1.01


@pytest.mark.parametrize("bits", [2, 4])
def test_dorefa_weights_have_the_best_gain(bits: int) -> None:
    x = 0.1 * tensor("normal", (5, 300), 0)
    quantizer = made("dorefa", x, Role.WEIGHT, bits, channels=True)
    values, steps = x.numpy().astype(np.float64), 2**bits - 1
    bent = np.tanh(values)
    place = bent / (2 * np.abs(bent).max(1, keepdims=True)) + 0.5
    unit = 2 * np.round(steps * place) / steps - 1
    gain = np.array(
        [np.linalg.lstsq(u[:, None], v, rcond=None)[0][0] for u, v in zip(unit, values, strict=True)]
    )
    np.testing.assert_allclose(quantizer.step.detach().numpy(), 2 * gain / steps, rtol=1e-5)
    assert (np.abs(quantizer(x).detach().numpy() - gain[:, None] * unit) < 1e-5).all()


def test_dorefa_activations_are_clipped_at_the_least_squared_error() -> None:
    x = tensor("normal", (400, 3), 0).relu()
    quantizer = made("dorefa", x, Role.ACTIVATION, 3, signed=False)
    spec, zero = quantizer.candidate.spec, torch.zeros(())
    steps = torch.linspace(0.05, 1, 500)
    errors = [(fake_quantize(x, step, zero, spec) - x).square().mean().item() for step in steps]
    assert (quantizer(x) - x).square().mean().item() <= min(errors) * 1.01


def test_pact_begins_at_a_percentile() -> None:
    x = tensor("normal", (400, 5), 0)
    quantizer = made("pact", x, Role.ACTIVATION, 2, signed=False)
    wanted = np.quantile(np.maximum(x.numpy(), 0), 0.999, method="inverted_cdf")
    assert quantizer.alpha.item() == pytest.approx(wanted)


def test_pams_begins_at_the_largest_magnitude() -> None:
    x = tensor("normal", (400, 5), 0)
    assert made("pams", x, Role.ACTIVATION, 4).alpha.item() == pytest.approx(x.abs().max().item())


def test_tqt_begins_at_three_deviations() -> None:
    x = tensor("normal", (4, 500), 0) * torch.tensor([0.1, 1.0, 7.0, 60.0])[:, None]
    quantizer = made("tqt", x, Role.WEIGHT, 4, channels=True)
    values = x.numpy()
    threshold = np.abs(values.mean(1)) + 3 * values.std(1)
    wanted = 2 ** np.ceil(np.log2(threshold)) / 8
    assert np.array_equal(quantizer.grid().scale.numpy(), wanted.astype(np.float32))


@pytest.mark.parametrize(("name", "role", "symmetric", "signed"), ALLOWED)
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-20, 1e20, -3.0])
def test_constants_give_a_usable_scale(
    name: str, role: Role, symmetric: bool, signed: bool, value: float
) -> None:
    for shape in ((1, 1), (2, 3)):
        quantizer = made(name, torch.full(shape, value), role, 4, symmetric, signed)
        scale = quantizer.grid().scale
        assert torch.isfinite(scale).all() and (scale > 0).all() and (quantizer.floor < torch.inf).all()
        assert torch.isfinite(quantizer(torch.full(shape, value))).all()
        assert torch.isfinite(quantizer(torch.ones(shape))).all()


def test_every_algorithm_is_here() -> None:
    assert {name for name, *_ in ALLOWED} == set(learned_algorithms())

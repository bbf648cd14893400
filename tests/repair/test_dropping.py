"""Chances, dropped quantization, and the gradient of a step that learns."""

import pytest
import torch

from dqss.mixing import Grid
from dqss.quantizers import build
from dqss.repair.chance import chances
from dqss.repair.dropping import DroppingQuantizer
from dqss.spec import Candidate, QuantSpec


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.75, 1.0])
def test_chances_are_met_and_independent(share: float) -> None:
    found = chances((1000, 333), share, generator())
    assert found.shape == (1000, 333) and found.dtype == torch.bool
    wanted = round(share * 256) / 256
    error = (wanted * (1 - wanted) / found.numel()) ** 0.5
    assert abs(float(found.double().mean()) - wanted) <= 4 * error
    # Neighbours, which come out of one number, know nothing of one another.
    for lag in (1, 4, 8):
        both = (found.flatten()[lag:] & found.flatten()[:-lag]).double().mean()
        assert abs(float(both) - wanted**2) <= 5 * error
    assert torch.equal(found, chances((1000, 333), share, generator()))
    if 0 < share < 1:
        assert not torch.equal(found, chances((1000, 333), share, generator(1)))


def quantizer() -> tuple[torch.nn.Module, Grid]:
    made = build(Candidate.of("minmax", QuantSpec(3, False)), 1)
    made.load_grid(torch.tensor([0.3]), torch.tensor([2.0]))
    return made, made.grid()


def test_values_are_quantized_or_left() -> None:
    made, _ = quantizer()
    x = torch.randn(4000, generator=generator())
    half = DroppingQuantizer(made, 0.5, False, generator())(x)  # type: ignore[arg-type]
    left, quantized = half == x, half == made(x)
    assert bool((left | quantized).all()) and 0.45 < float(left.float().mean()) < 0.56
    assert torch.equal(DroppingQuantizer(made, 0.0, False, generator())(x), made(x))  # type: ignore[arg-type]
    assert torch.equal(DroppingQuantizer(made, 1.0, True, generator())(x), x)  # type: ignore[arg-type]


def test_the_gradient_of_a_step_is_that_of_lsq() -> None:
    made, grid = quantizer()
    step = DroppingQuantizer(made, 0.0, True, generator())  # type: ignore[arg-type]
    x = torch.linspace(-1.5, 2.5, 101, requires_grad=True)
    weight = torch.randn(101, generator=generator())
    output = step(x)
    torch.testing.assert_close(output, made(x))
    (output * weight).sum().backward()  # type: ignore[no-untyped-call]
    # Equation 3 of arXiv 1902.08153, with the zero point; the logarithm brings a factor of the step.
    scale, zero = float(grid.scale), float(grid.zero_point)
    places = x.detach() / scale + zero
    inside = (places.round() >= 0) & (places.round() <= 7)
    ends = places.clamp(0, 7) - zero
    each = torch.where(inside, places.round() - places, ends.round())
    assert step.shift.grad is not None and x.grad is not None
    torch.testing.assert_close(
        float(step.shift.grad), float((each * weight).sum() * scale), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(x.grad, torch.where(inside, weight, 0.0))

"""A static quantizer keeps its grid at hand, and never one that it no longer has."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dqss.functional import fake_quantize
from dqss.quantizers import StaticQuantizer
from dqss.spec import Candidate, PerChannel, QuantSpec

SPEC = QuantSpec(4, False, PerChannel(1))


def made(scale: float) -> StaticQuantizer:
    quantizer = StaticQuantizer(Candidate.of("minmax", SPEC), 3)
    quantizer.load_grid(torch.tensor([scale, 2 * scale, 3 * scale]), torch.tensor([3.0, 7.0, 0.0]))
    return quantizer


def rounded(x: Tensor, quantizer: StaticQuantizer) -> Tensor:
    grid = quantizer.grid()
    return fake_quantize(x, *grid.shaped(x.shape), grid.spec)


CHANGES: dict[str, Callable[[StaticQuantizer], object]] = {
    "another grid": lambda q: q.load_grid(torch.full((3,), 0.7), torch.ones(3)),
    "another state": lambda q: q.load_state_dict(made(0.9).state_dict()),
    "another precision": lambda q: q.double(),
    "none": lambda q: None,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("size", [1, 40])
def test_it_follows_every_change_of_its_grid(change: Callable[[StaticQuantizer], object], size: int) -> None:
    x, quantizer = 4 * torch.randn(2, 3, size, size), made(0.3)
    assert torch.equal(quantizer(x), rounded(x, quantizer))
    change(quantizer)
    assert torch.equal(quantizer(x), rounded(x, quantizer))
    assert torch.equal(copy.deepcopy(quantizer)(x), rounded(x, quantizer))


@pytest.mark.parametrize("size", [1, 40])
def test_the_same_bits_and_the_straight_through_gradient_where_one_is_wanted(size: int) -> None:
    x, quantizer = 4 * torch.randn(2, 3, size, size), made(0.3)
    plain, leaf = quantizer(x), x.clone().requires_grad_()
    wanted = x.clone().requires_grad_()
    found, reference = quantizer(leaf), rounded(wanted, quantizer)
    assert torch.equal(found, plain) and torch.equal(reference, plain)
    gradient = torch.randn(x.shape)
    found.backward(gradient)
    reference.backward(gradient)
    assert leaf.grad is not None and wanted.grad is not None
    torch.testing.assert_close(leaf.grad, wanted.grad)

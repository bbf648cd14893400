"""Functions in fp64: the formulas against torch's own, and what is rounded how often."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.arithmetic.doubles import Doubles
from dqss.arithmetic.erfc import erf, erfc, gelu, tanh_gelu

WIDE = torch.cat([torch.linspace(-end, end, 100_001, dtype=torch.float64) for end in (1, 6, 35)])


def test_the_formula_is_the_error_function_to_a_tenth_of_a_float_rounding() -> None:
    assert (erf(WIDE) - torch.erf(WIDE)).abs().max() < 2e-9
    size = WIDE.abs()[WIDE.abs() < 26]  # beyond that it is no normal number
    exact = torch.special.erfc(size)
    assert ((erfc(size) - exact).abs() / exact).max() < 2e-9


def test_gelu_in_both_forms() -> None:
    assert (gelu(WIDE) - F.gelu(WIDE)).abs().max() < 1e-9
    assert (tanh_gelu(WIDE) - F.gelu(WIDE, approximate="tanh")).abs().max() < 1e-14
    # In the lower tail small values keep their digits.
    low = torch.linspace(-30, -1, 1001, dtype=torch.float64)
    exact = low * torch.special.erfc(-low / math.sqrt(2)) / 2
    assert ((gelu(low) - exact).abs() / exact.abs()).max() < 1e-8


LAYER, NORM = nn.Linear(8, 5), nn.LayerNorm(8)
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "softmax": (lambda x: x.softmax(-1), lambda x: torch.softmax(x.double(), -1)),
    "functional softmax": (
        lambda x: F.softmax(x, dim=1, dtype=torch.float32),
        lambda x: torch.softmax(x.double(), 1),
    ),
    "log softmax": (lambda x: F.log_softmax(x, -1), lambda x: torch.log_softmax(x.double(), -1)),
    "layer norm": (
        lambda x: NORM(x),
        lambda x: F.layer_norm(x.double(), (8,), NORM.weight.double(), NORM.bias.double(), NORM.eps),
    ),
    "sigmoid in place": (lambda x: x.clone().sigmoid_(), lambda x: torch.sigmoid(x.double())),
    "gelu": (nn.GELU(), lambda x: gelu(x.double())),
    "gelu by tanh": (nn.GELU("tanh"), lambda x: tanh_gelu(x.double())),
    "product": (lambda x: x @ x.transpose(-2, -1), lambda x: x.double() @ x.double().transpose(-2, -1)),
    "sum over letters": (
        lambda x: torch.einsum("btc,bsc->bts", x, x),
        lambda x: torch.einsum("btc,bsc->bts", x.double(), x.double()),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@torch.no_grad()
def test_functions_are_rounded_once(name: str) -> None:
    func, wide = FUNCTIONS[name]
    x = 3 * torch.randn(16, 40, 8, generator=torch.Generator().manual_seed(0))
    with Doubles():
        found = func(x)
    assert found.dtype is torch.float32 and torch.equal(found, wide(x).float())
    assert not torch.equal(func(x), found)


@torch.no_grad()
def test_gates_multiply_in_single_precision() -> None:
    x = torch.randn(16, 40, 8, generator=torch.Generator().manual_seed(0))
    gate = torch.sigmoid(x.double()).float()
    with Doubles():
        assert torch.equal(F.silu(x), x * gate)
        assert torch.equal(F.glu(x), x[..., :4] * gate[..., 4:])
        kept = x.clone()
        assert F.silu(kept, inplace=True) is kept and torch.equal(kept, x * gate)
        assert torch.equal(LAYER(x), (x.double() @ LAYER.weight.double().T).float() + LAYER.bias)


@torch.no_grad()
def test_other_types_stay_as_they_are() -> None:
    x = torch.randn(3, 8)
    for dtype in (torch.float64, torch.bfloat16):
        with Doubles():
            found = torch.softmax(x.to(dtype), -1)
        assert torch.equal(found, torch.softmax(x.to(dtype), -1))
    with Doubles():
        out = torch.empty(3, 8)
        torch.sigmoid(x, out=out)
    assert torch.equal(out, torch.sigmoid(x))


@torch.no_grad()
def test_attention_without_quantizers_is_attention() -> None:
    query, key, value, mask = (torch.randn(2, 3, *size) for size in ((5, 4), (7, 4), (7, 4), (5, 7)))
    for options in ({}, {"scale": 0.3}, {"attn_mask": mask}, {"attn_mask": mask > 0}, {"is_causal": True}):
        plain = F.scaled_dot_product_attention(query, key, value, **options)
        with Doubles():
            found = F.scaled_dot_product_attention(query, key, value, **options)
        torch.testing.assert_close(found, plain)

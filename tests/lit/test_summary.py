"""The table of choices says what tells two choices apart, and no more."""

import io

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from dqss.discretize import RefineSettings
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from dqss.lit.summary import print_plan, print_result, print_rows
from dqss.samples import Samples
from dqss.space import Rule, SearchSpace
from dqss.spec import Candidate, PerGroup, QuantSpec
from tests.support.nets import cnn, images, small_space

SETTINGS = PTQSettings(steps=2, batch_size=8, refine=RefineSettings(passes=0), discrete_every=0)


class SelfAttention(nn.Module):
    """Inputs ``[N, 5, 4]``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x).mean(1)


@pytest.mark.parametrize("products", [False, True])
def test_products_are_counted_or_listed(products: bool) -> None:
    text = io.StringIO()
    console, space = Console(file=text, width=80), small_space(4, products=products)
    model, inputs = nn.Sequential(SelfAttention(), nn.Linear(4, 3)).eval(), torch.randn(24, 5, 4)
    print_result(console, search_ptq(model, inputs, space, SETTINGS), None)
    print_plan(console, model, Samples.of(inputs), space, SETTINGS, 0)
    assert max(map(len, text.getvalue().splitlines())) <= 80
    found = " ".join(text.getvalue().split())
    said = "1 product of two activations (attention) stay in float: 'W8A8' means weights and layer inputs"
    assert found.count(said) == (0 if products else 2)
    for operand in ("query", "key", "probabilities", "value"):
        assert found.count(f"0.product0 {operand} ") == (2 if products else 0)
    assert ("1 layers, 1 products, 6 decisions" in found) == products


def table(first: QuantSpec, others: QuantSpec) -> str:
    """Printed choices where the first layer's input is on another grid than those of the others."""
    weight = (Candidate.of("mse", QuantSpec(4, True, PerGroup(8))),)
    one, rest = ((Candidate.of("mse", spec),) for spec in (first, others))
    space = SearchSpace("test", (Rule(weight, one, names=("0",)), Rule(weight, rest)))
    text = io.StringIO()
    result = search_ptq(cnn(), images(24), space, SETTINGS)
    print_result(Console(file=text, width=200), result, None)
    assert max(map(len, text.getvalue().splitlines())) <= 80
    return text.getvalue().split("best uniform")[0]


def test_one_kind_of_grid_is_not_spelled_out() -> None:
    found = table(QuantSpec(4, False), QuantSpec(8, False))
    assert "mse@4" in found and "mse@8" in found
    assert not any(word in found for word in ("affine", "symmetric", "group"))


def test_several_kinds_are() -> None:
    found = table(QuantSpec(4, True, signed=False), QuantSpec(4, False))
    assert "mse@4 unsigned symmetric tensor" in found and "mse@4 affine tensor" in found
    assert "group" not in found  # weights have only one kind


def test_decibels_are_not_percent() -> None:
    stream = io.StringIO()
    rows = {name: {"selection": {"distance": 0.5, "count": 3, name: 0.25}} for name in ("psnr", "top1")}
    print_rows(Console(file=stream, width=100), {**rows, "distance": "mse"}, rows, "selection")
    first, second = stream.getvalue().splitlines()
    assert "0.25 dB" in first and "%" not in first
    assert "25.00 %" in second

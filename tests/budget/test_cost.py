"""Expected costs and prices against the sum over every assignment, and torch's own derivative."""

import random

import pytest
import torch

from tests.support.budgets import every, peak_cost, sizes, sum_cost


@pytest.mark.parametrize("seed", range(20))
def test_expected_cost_is_the_mean_over_all_assignments_and_prices_its_derivative(seed: int) -> None:
    source = random.Random(seed)
    options = sizes(source)
    cost = sum_cost(source, options, "cost", whole=False)
    torch.manual_seed(seed)
    p = {name: torch.softmax(torch.randn(k).double(), 0).requires_grad_() for name, k in options.items()}
    mean = torch.zeros((), dtype=torch.float64)
    for one in every(options):
        chance = torch.stack([p[name][k] for name, k in one.items()]).prod()
        mean = mean + chance.detach() * cost.of(one)
    expected = cost.expected(p)
    assert expected.item() == pytest.approx(float(mean))
    prices = cost.prices({name: value.detach() for name, value in p.items()})
    if not prices:
        return
    expected.backward()  # type: ignore[no-untyped-call]
    for name, value in p.items():
        assert (name in prices) == (value.grad is not None)
        if value.grad is not None:
            torch.testing.assert_close(prices[name], value.grad)


@pytest.mark.parametrize("seed", range(20))
def test_with_certain_choices_the_expected_cost_is_the_exact_one(seed: int) -> None:
    source = random.Random(seed)
    options = sizes(source)
    for cost in (sum_cost(source, options, "cost"), peak_cost(source, options)):
        for one in every(options):
            certain = {n: torch.eye(k, dtype=torch.float64)[one[n]] for n, k in options.items()}
            assert float(cost.expected(certain)) == pytest.approx(cost.of(one))

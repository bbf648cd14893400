"""Estimates that are drawn together: nearer to the truth than either of the two that they are made of."""

import torch

from dqss.shrinkage import shrink

Problem = tuple[dict[str, torch.Tensor], ...]


def problem(seed: int, tensors: float, options: float, noise: float) -> Problem:
    """Costs of 24 options of 30 tensors: what is true, what is seen, its error, and the prior.

    Their ratios to the prior differ by tensor and by option; what is seen is off by a part that a tensor's
    options have in common.
    """
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(3, 30, 24, generator=draw, dtype=torch.float64)
    common = torch.randn(2, 30, 1, generator=draw, dtype=torch.float64)
    prior = torch.exp(2 * normal[0])
    true = 0.3 * prior * torch.exp(tensors * common[0] + options * normal[1])
    seen = true * torch.exp(noise * (common[1] + normal[2]) / 2**0.5)
    parts = (true, seen, noise * seen, prior)
    return tuple({f"{t}": row for t, row in enumerate(part)} for part in parts)


def error(found: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> float:
    """Of the logarithms, but for a common factor."""
    ratio = torch.log(torch.stack([found[name] / true[name] for name in true]))
    return float((ratio - ratio.mean()).square().mean())


def test_it_is_nearer_to_the_truth_than_what_was_seen_and_than_the_prior() -> None:
    cases = ((0.3, 0.2, 0.3), (0.1, 0.1, 0.4), (0.4, 0.4, 0.3))
    rows = [problem(seed, *case) for seed in range(10) for case in cases]
    found = sum(error(shrink(*row[1:]), row[0]) for row in rows)
    assert found < 0.7 * sum(error(row[1], row[0]) for row in rows)
    assert found < 0.7 * sum(error(row[3], row[0]) for row in rows)


def test_of_tensors_that_differ_by_noise_alone_the_prior_is_left() -> None:
    true, seen, noise, prior = problem(1, 0.0, 0.0, 0.3)
    found = shrink(seen, noise, prior)
    assert error(found, true) < 0.05 * error(seen, true)


def test_exact_costs_stay_and_worthless_ones_become_the_prior() -> None:
    true, _, _, prior = problem(0, 0.5, 0.5, 0.0)
    found = shrink(true, {name: torch.full_like(each, 1e-12) for name, each in true.items()}, prior)
    for name, each in found.items():
        torch.testing.assert_close(each, true[name])
    found = shrink(true, {name: 10 * each for name, each in true.items()}, prior)
    ratio = torch.stack([found[name] / prior[name] for name in found])
    torch.testing.assert_close(ratio, ratio[:1, :1].expand(30, 24))


def test_units_do_not_matter() -> None:
    _, seen, noise, prior = problem(0, 0.3, 0.3, 0.3)
    times = [{name: factor * each for name, each in part.items()} for factor, part in
             ((5, seen), (5, noise), (7, prior))]  # fmt: skip
    found, wanted = shrink(*times), shrink(seen, noise, prior)
    for name, each in found.items():
        torch.testing.assert_close(each, 5 * wanted[name])


def test_what_cannot_be_compared_stays_as_it_is() -> None:
    def alone(cost: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        return shrink({"a": cost}, {"a": noise[: len(cost)]}, {"a": prior})["a"]

    cost, noise = torch.tensor([0.0, 2.0, 3.0, 5.0]).double(), torch.tensor([0.0, 1.0, 1.0, 1.0]).double()
    found = alone(cost, torch.tensor([0.0, 1.0, 2.0, 3.0]).double())
    assert found[0] == 0 and bool((found[1:] > 0).all())
    assert torch.equal(alone(cost, torch.zeros(4).double()), cost)
    assert torch.equal(alone(cost[:3], torch.ones(3).double()), cost[:3])
    broken = torch.tensor([torch.inf, 2.0, 3.0, 5.0]).double()
    assert torch.isinf(alone(broken, torch.ones(4).double())[0])

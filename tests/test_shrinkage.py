"""Estimates that are drawn together: nearer to the truth than either of the two that they are made of."""

import torch

from dqss.shrinkage import shrink


def problem(seed: int, spread: float, noise: float) -> tuple[torch.Tensor, ...]:
    """Costs of 24 options whose ratios to the distortion differ, what is seen of them, and its error."""
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn(3, 24, generator=draw, dtype=torch.float64)
    distortion = torch.exp(2 * normal[0])
    true = 0.3 * distortion * torch.exp(spread * normal[1])
    seen = true * torch.exp(noise * normal[2])
    return true, seen, noise * seen, distortion


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Of the logarithms, but for a common factor."""
    ratio = torch.log(found / true)
    return float((ratio - ratio.mean()).square().mean())


def test_it_is_nearer_to_the_truth_than_the_costs_that_were_seen_and_than_the_distortion() -> None:
    rows = [problem(seed, *case) for seed in range(50) for case in ((0.2, 0.2), (0.1, 0.4), (0.4, 0.2))]
    found = sum(error(shrink(*row[1:]), row[0]) for row in rows)
    assert found < 0.8 * sum(error(row[1], row[0]) for row in rows)
    assert found < 0.8 * sum(error(row[3], row[0]) for row in rows)


def test_exact_costs_stay_and_worthless_ones_become_the_distortion() -> None:
    true, _, _, distortion = problem(0, 0.5, 0.0)
    torch.testing.assert_close(shrink(true, torch.full_like(true, 1e-12), distortion), true)
    ratio = shrink(true, 10 * true, distortion) / distortion
    torch.testing.assert_close(ratio, ratio[:1].expand(24))


def test_units_do_not_matter() -> None:
    _, seen, noise, distortion = problem(0, 0.3, 0.3)
    found = shrink(seen, noise, distortion)
    torch.testing.assert_close(shrink(5 * seen, 5 * noise, 7 * distortion), 5 * found)


def test_what_cannot_be_compared_stays_as_it_is() -> None:
    cost, noise = torch.tensor([0.0, 2.0, 3.0, 5.0]).double(), torch.tensor([0.0, 1.0, 1.0, 1.0]).double()
    found = shrink(cost, noise, torch.tensor([0.0, 1.0, 2.0, 3.0]).double())
    assert found[0] == 0 and bool((found[1:] > 0).all())
    assert torch.equal(shrink(cost, noise, torch.zeros(4).double()), cost)
    assert torch.equal(shrink(cost[:3], noise[:3], torch.ones(3).double()), cost[:3])
    broken = torch.tensor([torch.inf, 2.0, 3.0, 5.0]).double()
    assert torch.isinf(shrink(broken, noise, torch.ones(4).double())[0])

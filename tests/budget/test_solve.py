"""The integer program against trying every assignment."""

import random
import time

import pytest
import torch

from dqss.budget import groups
from dqss.budget.cost import Pair, SumCost
from dqss.budget.solve import Limit, minimize, smallest
from tests.support.budgets import best, every, limits, peak_cost, sizes, sum_cost


@pytest.mark.parametrize("seed", range(200))
def test_the_solution_is_the_best_there_is_and_within_every_limit(seed: int) -> None:
    source = random.Random(seed)
    options = sizes(source)
    objective = sum_cost(source, options, "score", pairs=seed % 4 == 0, whole=seed % 2 == 0)
    costs = [sum_cost(source, options, f"cost{k}", whole=seed % 3 > 0) for k in range(source.randint(1, 3))]
    kept = limits(source, options, [*costs, *([peak_cost(source, options)] if seed % 5 == 0 else [])])
    found = minimize(objective, options, kept)
    wanted = best(objective, options, kept)
    assert (found is None) == (wanted is None)
    if found is not None:
        assert set(found) == set(options) and all(limit.holds(found) for limit in kept)
        assert objective.of(found) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_among_the_random_spaces_are_infeasible_trivial_and_binding_ones() -> None:
    kinds = {"infeasible": 0, "trivial": 0, "binding": 0}
    for seed in range(200):
        source = random.Random(seed)
        options = sizes(source)
        objective = sum_cost(source, options, "score", pairs=seed % 4 == 0, whole=seed % 2 == 0)
        costs = [
            sum_cost(source, options, f"cost{k}", whole=seed % 3 > 0) for k in range(source.randint(1, 3))
        ]
        kept = limits(source, options, [*costs, *([peak_cost(source, options)] if seed % 5 == 0 else [])])
        wanted, free = best(objective, options, kept), best(objective, options, [])
        kinds["infeasible" if wanted is None else "trivial" if wanted == free else "binding"] += 1
    assert min(kinds.values()) >= 30, kinds


@pytest.mark.parametrize("seed", range(40))
def test_decisions_with_too_many_combinations_are_linked_pair_by_pair(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "MOST_COMBINATIONS", 5)
    source = random.Random(1000 + seed)
    options = sizes(source)
    objective = sum_cost(source, options, "score")
    kept = limits(
        source, options, [sum_cost(source, options, "a"), sum_cost(source, options, "b", whole=False)]
    )
    found, wanted = minimize(objective, options, kept), best(objective, options, kept)
    assert (found is None) == (wanted is None)
    if found is not None:
        assert all(limit.holds(found) for limit in kept)
        assert objective.of(found) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_the_smallest_value_of_a_cost_is_the_smallest_of_all(seed: int) -> None:
    source = random.Random(seed)
    options = sizes(source)
    cost = peak_cost(source, options) if seed % 2 else sum_cost(source, options, "a")
    kept = limits(source, options, [sum_cost(source, options, "b")])
    values = [cost.of(one) for one in every(options) if kept[0].holds(one)]
    found = smallest(cost, options, kept)
    assert found == (pytest.approx(min(values)) if values else None)


def test_a_hair_over_the_limit_is_over_the_limit() -> None:
    """A difference far below the solver's tolerance, in a sum of whole numbers."""
    bits = torch.tensor([10**12, 10**12 - 1], dtype=torch.float64)
    cost = SumCost("size", "", {"a": bits, "b": bits})
    score = SumCost("score", "", {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([0.0, 2.0])})
    found = minimize(score, {"a": 2, "b": 2}, [Limit(cost, 2.0 * 10**12 - 1)])
    assert found == {"a": 1, "b": 0}
    assert minimize(score, {"a": 2, "b": 2}, [Limit(cost, 2.0 * 10**12 - 3)]) is None
    assert smallest(cost, {"a": 2, "b": 2}) == 2.0 * 10**12 - 2


def _large(seed: int, layers: int = 200, options: int = 16) -> tuple[SumCost, SumCost, SumCost]:
    """Errors that fall by four a bit, sizes over three decades, and BitOPs of weight times activation."""
    draw = torch.Generator().manual_seed(seed)
    bits = torch.tensor([[2, 3, 4, 5, 6, 7, 8, 16][k % 8] for k in range(options)], dtype=torch.float64)
    score, size, pairs = {}, {}, []
    for layer in range(layers):
        values = int(torch.randint(100, 100_000, (1,), generator=draw))
        macs = int(torch.randint(1000, 10**7, (1,), generator=draw))
        for side in "wa":
            scatter = 1 + torch.rand(options, generator=draw).double()
            score[f"{layer}{side}"] = torch.rand(1, generator=draw).double() * 4**-bits * scatter
        size[f"{layer}w"] = values * bits
        pairs.append(Pair(f"{layer}w", f"{layer}a", macs * torch.outer(bits, bits)))
    return SumCost("score", "", score), SumCost("size", "", size), SumCost("bitops", "", {}, tuple(pairs))


@pytest.mark.parametrize("kind", ["size", "bitops"])
def test_two_hundred_layers_of_sixteen_options_a_side_take_two_seconds(kind: str) -> None:
    score, size, bitops = _large(seed=0)
    cost = size if kind == "size" else bitops
    options = dict.fromkeys(score.single, 16)
    four = dict.fromkeys(options, 2)
    limit = Limit(cost, cost.of(four) * 1.01)
    started = time.process_time()
    found = minimize(score, options, [limit])
    assert time.process_time() - started < 2
    assert found is not None and limit.holds(found)
    assert score.of(found) < 0.6 * score.of(four)  # what mixing widths is for

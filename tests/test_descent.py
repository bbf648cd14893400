"""Steps of the integer program: within limits, never worse, and the best there is if nothing interacts."""

import itertools
import random
from typing import Any

import pytest

from dqss.budget.limits import Limits
from dqss.budget.solve import Limit, minimize
from dqss.descent import descend
from dqss.discretize import RefineSettings, discretize
from tests.support.budgets import best, every, sizes, sum_cost
from tests.test_discretize import Landscape


def limited(seed: int, landscape: Any, pairs: bool = False) -> tuple[Limits, dict[str, int]]:
    source = random.Random(seed)
    options = dict.fromkeys(landscape.names, 4)
    costs = [sum_cost(source, options, "a", pairs=pairs), sum_cost(source, options, "b", pairs=pairs)]
    start = source.choice(every(options))
    return Limits(options, [Limit(cost, cost.of(start)) for cost in costs]), start


@pytest.mark.parametrize("seed", range(8))
def test_one_step_finds_the_best_within_limits_where_nothing_interacts(seed: int) -> None:
    landscape: Any = Landscape(seed)
    limits, start = limited(seed, landscape, pairs=seed % 2 == 1)
    found, changes = descend(landscape, start, limits, passes=1000)
    assert limits.hold(found)
    allowed = [one for one in every(dict(limits.options)) if limits.hold(one)]
    assert landscape.value(found) == pytest.approx(min(landscape.value(one) for one in allowed))
    assert len(changes) <= 1


@pytest.mark.parametrize("seed", range(8))
def test_where_much_interacts_it_is_never_worse_and_ends_where_no_pair_is_promising(seed: int) -> None:
    landscape: Any = Landscape(seed, pairwise=1.0)
    limits, start = limited(seed, landscape)
    found, changes = descend(landscape, start, limits, passes=1000)
    assert limits.hold(found)
    assert landscape.value(found) <= landscape.value(start)
    assert (landscape.value(found) < landscape.value(start)) == bool(changes) == (found != start)
    # The pair (or single) of switches with the least sum of effects, if there is any to gain, gains nothing.
    effects = landscape.first_order(found, "refine")
    trials = [
        {**found, one: j, other: k}
        for one, other in itertools.combinations(landscape.names, 2)
        for j, k in itertools.product(range(4), repeat=2)
    ]
    promised = {
        k: sum(float(effects[name][trial[name]]) for name in landscape.names)
        for k, trial in enumerate(trials)
        if limits.hold(trial)
    }
    chosen = trials[min(promised, key=promised.__getitem__)]
    assert landscape.value(chosen) >= landscape.value(found) - 1e-6


def test_no_step_is_begun_beyond_its_passes_or_out_of_time() -> None:
    landscape: Any = Landscape(1, pairwise=1.0)
    limits, start = limited(1, landscape)
    assert descend(landscape, start, limits, passes=0) == (start, [])
    assert descend(landscape, start, limits, 1000, out_of_time=lambda: True) == (start, [])
    assert landscape.meter.evaluations == 0
    descend(landscape, start, limits, passes=2)
    assert landscape.meter.evaluations <= 100 + 3 * 100 + 100


@pytest.mark.parametrize("seed", range(30))
def test_what_is_near_is_what_trying_all_finds(seed: int) -> None:
    source = random.Random(seed)
    options = sizes(source)
    cost, objective = (
        sum_cost(source, options, "a"),
        sum_cost(source, options, "score", pairs=False, whole=False),
    )
    current = source.choice(every(options))
    limits = Limits(options, [Limit(cost, cost.of(current) + source.choice([0.0, 0.5]))])
    for changes in range(len(options) + 1):
        near = limits.near(current, changes)
        found = minimize(objective, options, near.limits)
        assert found is not None and sum(found[name] != k for name, k in current.items()) <= changes
        kept = [one for one in every(options) if sum(one[n] != k for n, k in current.items()) <= changes]
        values = [objective.of(one) for one in kept if limits.hold(one)]
        assert objective.of(found) == pytest.approx(min(values))
    assert best(objective, options, limits.limits) == pytest.approx(min(values))


def test_a_uniform_strategy_that_is_better_than_all_found_is_begun_from() -> None:
    landscape: Any = Landscape(3, pairwise=1.0)
    worst = max(every(dict.fromkeys(landscape.names, 4)), key=landscape.value)
    uniform: Any = {f"u{k}": dict.fromkeys(landscape.names, k) for k in range(4)}
    options = dict.fromkeys(landscape.names, 4)
    limits = Limits(options, [Limit(sum_cost(random.Random(0), options, "a", pairs=False), 1e9)])
    for passes in (1, 100):  # the one is not enough to find anything
        settings = RefineSettings(passes=passes, program_passes=0, screen=100)
        outcome = discretize(landscape, [worst], uniform, settings, finalists=4, limits=limits)
        assert outcome.best_uniform is not None
        values = {name: landscape.value(found) for name, found in outcome.assignments.items()}
        assert values["refined"] <= values[outcome.best_uniform] < values["argmax"]
        assert (values["refined"] < values[outcome.best_uniform]) == (passes > 1)
        assert outcome.exported == ("refined" if passes > 1 else outcome.best_uniform)

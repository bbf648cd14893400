"""Switches within limits: nothing that breaks one, and the best second switch that pays for a first."""

import itertools
import random

import pytest

from dqss.budget.limits import Limits
from dqss.budget.solve import Limit
from dqss.budget.switches import Switch, within
from tests.support.budgets import every, peak_cost, sizes, sum_cost


@pytest.mark.parametrize("seed", range(60))
def test_what_may_be_tried_is_what_trying_all_finds(seed: int) -> None:
    source = random.Random(seed)
    options = sizes(source)
    costs = [sum_cost(source, options, "a", pairs=False), sum_cost(source, options, "b", pairs=False)]
    current = source.choice(every(options))
    rooms = [Limit(cost, cost.of(current) + source.choice([0.0, 0.0, 0.4, 2.0])) for cost in costs]
    if seed % 3 == 0:
        peak = peak_cost(source, options)
        rooms.append(Limit(peak, peak.of(current)))
    limits = Limits(options, rooms)
    switches = [
        Switch(source.random() - 0.5, name, k)
        for name, count in options.items()
        for k in range(count)
        if k != current[name]
    ]
    found = {
        tuple(sorted(move.items())): effect for effect, move in within(switches, switches, current, limits)
    }
    wanted = {}
    for first in switches:
        alone = {first.name: first.option}
        if limits.hold({**current, **alone}):
            wanted[tuple(sorted(alone.items()))] = first.effect
            continue
        pairs = [
            (first.effect + second.effect, {**alone, second.name: second.option})
            for second in switches
            if second.name != first.name and limits.hold({**current, **alone, second.name: second.option})
        ]
        if pairs:
            effect, move = min(pairs, key=lambda pair: pair[0])
            wanted[tuple(sorted(move.items()))] = effect
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(20))
def test_what_two_decisions_cost_together_is_counted_too(seed: int) -> None:
    source = random.Random(500 + seed)
    options = sizes(source)
    cost = sum_cost(source, options, "a")
    current = source.choice(every(options))
    limits = Limits(options, [Limit(cost, cost.of(current))])
    switches = [Switch(source.random(), n, k) for n, count in options.items() for k in range(count)]
    for _, move in within(switches, switches, current, limits):
        assert limits.hold({**current, **move})


def test_refinement_under_a_limit_ends_where_no_move_within_it_helps() -> None:
    """On a landscape that is a sum over decisions: no single switch, and no pair, is better and allowed."""
    from dqss.discretize import RefineSettings, refine
    from tests.test_discretize import Landscape

    settings = RefineSettings(passes=1000, screen=10, alternatives=3, confidence=0.0, program_passes=0)
    moved = 0
    for seed in range(6):
        landscape = Landscape(seed)
        source = random.Random(seed)
        options = dict.fromkeys(landscape.names, 4)
        cost = sum_cost(source, options, "cost", pairs=False)
        start = source.choice(every(options))
        limits = Limits(options, [Limit(cost, cost.of(start))])
        found, changes = refine(landscape, start, settings, limits=limits)  # type: ignore[arg-type]
        assert limits.hold(found)
        reached = landscape.value(found)
        for one, other in itertools.combinations(landscape.names, 2):
            for j, k in itertools.product(range(4), repeat=2):
                trial = {**found, one: j, other: k}
                if trial[one] != found[one] and not limits.hold({**found, one: j}):
                    assert not limits.hold(trial) or landscape.value(trial) >= reached - 1e-6
        singles = ({**found, name: k} for name in landscape.names for k in range(4))
        assert all(landscape.value(t) >= reached - 1e-6 for t in singles if limits.hold(t))
        moved += any(" and " in line for line in changes)
    assert moved  # pairs were needed

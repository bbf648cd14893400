"""From logits to one choice a decision: refinement against brute force, and the promise."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dqss.decision import Decision
from dqss.discretize import RefineSettings, discretize, refine
from dqss.measure import Meter
from dqss.uniform import uniform_assignments
from tests.support.nets import THREE, calibrated, cnn, evaluator_of, images, small_space


class Landscape:
    """An evaluator whose distances are known: a sum over decisions, plus pairwise terms."""

    def __init__(self, seed: int, decisions: int = 5, options: int = 4, pairwise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.names = [f"d{k}" for k in range(decisions)]
        self.cost = torch.rand(decisions, options, generator=generator)
        self.pair = pairwise * torch.rand(decisions, decisions, options, options, generator=generator)
        self.parts = {"refine": list(range(100)), "select": list(range(50))}
        self.meter = Meter()
        self.blur = torch.zeros(100)
        self.start = [dict.fromkeys(self.names, 0)]
        self.supernet = SimpleNamespace(
            decisions={name: Decision(name, range(options)) for name in self.names},
        )

    def value(self, assignment: dict[str, int]) -> float:
        chosen = [assignment[name] for name in self.names]
        total = sum(float(self.cost[k, c]) for k, c in enumerate(chosen))
        for i, j in itertools.combinations(range(len(chosen)), 2):
            total += float(self.pair[i, j, chosen[i], chosen[j]])
        return total

    def measure(self, assignment: dict[str, int], part: str, count: int | None = None) -> float:
        each = self.measure_each(assignment, part, count)
        return sum(each) / len(each)

    def measure_each(self, assignment: dict[str, int], part: str, count: int | None = None) -> list[float]:
        indices = self.parts[part][:count]
        self.meter.forward(len(indices))
        differs = any(assignment.values())  # the images disagree about everything but the start
        return [self.value(assignment) + differs * float(self.blur[index]) for index in indices]

    def first_order(self, assignment: dict[str, int], part: str, count: int | None = None) -> Any:
        self.meter.backward(len(self.parts[part]))
        return {
            name: torch.tensor(
                [
                    self.value({**assignment, name: k}) - self.value(assignment)
                    for k in range(self.cost.shape[1])
                ]
            )
            for name in self.names
        }

    def second_order(self, assignment: dict[str, int], part: str, count: int | None = None) -> Any:
        return SimpleNamespace(effects=self.first_order(assignment, part, count))  # exact, both of them

    def best(self) -> float:
        options = range(self.cost.shape[1])
        every = itertools.product(options, repeat=len(self.names))
        return min(self.value(dict(zip(self.names, chosen, strict=True))) for chosen in every)


MANY = RefineSettings(passes=1000, screen=10, alternatives=3, confidence=0.0)


@pytest.mark.parametrize("seed", range(4))
def test_refinement_finds_the_optimum_of_a_separable_landscape(seed: int) -> None:
    landscape: Any = Landscape(seed)
    found, changes = refine(landscape, landscape.start[0], MANY)
    assert landscape.value(found) == pytest.approx(landscape.best())
    assert changes


@pytest.mark.parametrize("seed", range(4))
def test_refinement_ends_where_no_single_switch_helps(seed: int) -> None:
    landscape: Any = Landscape(seed, pairwise=1.0)
    start = landscape.start[0]
    found, changes = refine(landscape, start, MANY)
    reached = landscape.value(found)
    neighbours = [{**found, name: k} for name in landscape.names for k in range(4)]
    assert reached <= min(landscape.value(other) for other in neighbours) + 1e-12
    assert reached < landscape.value(start) and set(found) == set(start)
    # Each line of changes names a decision and a fall of the distance.
    for line in changes:
        before, after = line.split(", ")[1].split(" -> ")
        assert float(after) <= float(before)


def test_refinement_keeps_its_limit_and_its_deadline() -> None:
    for passes in (1, 3, 10):
        landscape: Any = Landscape(1, decisions=12, pairwise=1.0)
        refine(landscape, landscape.start[0], RefineSettings(passes=passes, screen=10))
        # the limit, and what was under way when it was reached: a sweep's gradient and one trial
        assert landscape.meter.evaluations <= passes * 100 + 300 + 100 + 10
    start = Landscape(1).start[0]
    untouched: Any = Landscape(1)
    assert refine(untouched, start, RefineSettings(passes=0)) == (start, [])
    assert refine(untouched, start, MANY, out_of_time=lambda: True) == (start, [])
    assert untouched.meter.evaluations == 0


@pytest.mark.parametrize(("spread", "kept"), [(0.5, True), (5.0, False)])
def test_a_gain_within_chance_is_not_kept(spread: float, kept: bool) -> None:
    """A mean gain of 0.1 over 100 images whose gains vary: two standard errors, or a fifth of one."""
    landscape: Any = Landscape(0, decisions=1, options=2)
    landscape.cost = torch.tensor([[0.5, 0.4]])
    noise = torch.randn(100)
    landscape.blur = spread * (noise - noise.mean()) / noise.std()
    found, _ = refine(landscape, {"d0": 0}, RefineSettings(screen=100, confidence=1.5))
    assert (found == {"d0": 1}) is kept
    found, _ = refine(landscape, {"d0": 0}, RefineSettings(screen=100, confidence=0.0))
    assert found == {"d0": 1}


@pytest.mark.parametrize("screen", [100, 10])
def test_refinement_leaves_what_is_no_number_and_takes_nothing_that_is_none(screen: int) -> None:
    """Option 0 overflows, option 1 gives NaN on some image, option 2 is fine."""
    landscape: Any = Landscape(0, decisions=1, options=3)
    each = {0: [float("inf")] * 100, 1: [0.1] * 99 + [float("nan")], 2: [0.5 + k / 1000 for k in range(100)]}
    landscape.measure_each = lambda found, part, count=None: each[found["d0"]][:count]
    landscape.first_order = lambda *_: {"d0": torch.tensor([0.0, -2.0, -1.0])}
    settings = RefineSettings(screen=screen, passes=9)
    assert refine(landscape, {"d0": 0}, settings)[0] == {"d0": 2}
    landscape.first_order = lambda *_: {"d0": torch.tensor([-1.0, -2.0, 0.0])}
    assert refine(landscape, {"d0": 2}, settings) == ({"d0": 2}, [])


@pytest.mark.parametrize("seed", range(6))
def test_exported_is_never_worse_than_best_uniform_on_selection(seed: int) -> None:
    landscape: Any = Landscape(seed, pairwise=2.0)
    uniform: Any = {f"u{k}": dict.fromkeys(landscape.names, k) for k in range(4)}
    outcome = discretize(landscape, landscape.start, uniform, RefineSettings(passes=2), finalists=4)
    values = {name: landscape.value(found) for name, found in outcome.assignments.items()}
    assert outcome.best_uniform is not None
    assert set(outcome.selection) == {"refined", "argmax", outcome.best_uniform}
    assert outcome.selection == pytest.approx({name: values[name] for name in outcome.selection})
    assert values[outcome.exported] == min(values["refined"], values[outcome.best_uniform])
    assert values[outcome.best_uniform] == min(landscape.value(found) for found in uniform.values())


def test_the_luckiest_uniform_strategy_on_the_selection_part_is_not_what_is_compared() -> None:
    """Twenty strategies alike, each with luck of its own there; the searched one is truly better."""
    exported = []
    for seed in range(20):
        landscape: Any = Landscape(seed, options=1)
        uniform: Any = {f"u{k}": {**dict.fromkeys(landscape.names, 0), "luck": k} for k in range(20)}
        luck = 0.1 * torch.randn(20, generator=torch.Generator().manual_seed(seed))
        at = landscape.measure_each

        def lucky(found: Any, part: str, count: int | None = None, at: Any = at, luck: Any = luck) -> Any:
            k = found.get("luck")
            penalty = 0.0 if k is None else 0.1 + float(luck[k] if part == "select" else luck[-k])
            known = {name: index for name, index in found.items() if name != "luck"}
            return [value + penalty for value in at(known, part, count)]

        landscape.measure_each = lucky
        outcome = discretize(landscape, landscape.start, uniform, RefineSettings(passes=0), finalists=4)
        exported.append(outcome.exported)
    # The luckiest of twenty would have won nearly always; one of them by itself does one time in six.
    assert exported.count("refined") >= 12


def test_the_best_of_what_the_search_has_found_is_taken() -> None:
    landscape: Any = Landscape(5)
    found = [dict.fromkeys(landscape.names, k) for k in (2, 0, 3, 1, 0)]
    best = min(found, key=landscape.value)
    outcome = discretize(landscape, found, {}, RefineSettings(passes=0), finalists=1)
    assert outcome.assignments["argmax"] == best
    late = discretize(landscape, found, {}, RefineSettings(), finalists=1, out_of_time=lambda: True)
    assert late.assignments["argmax"] == found[-1]


@pytest.mark.parametrize(("blur", "taken"), [(0.0, "found"), (100.0, "begun")])
def test_what_a_search_has_begun_from_gives_way_to_more_than_chance_only(blur: float, taken: str) -> None:
    landscape: Any = Landscape(5)
    landscape.blur = blur * torch.randn(100, generator=torch.Generator().manual_seed(0))
    landscape.blur -= landscape.blur.mean()
    other = {name: int(landscape.cost[k].argmin()) for k, name in enumerate(landscape.names)}
    assert landscape.value(other) < landscape.value(landscape.start[0])
    begun = landscape.start
    outcome = discretize(landscape, [other], {}, RefineSettings(passes=0), finalists=1, begun=begun)
    assert outcome.assignments["argmax"] == {"found": other, "begun": begun[0]}[taken]


@pytest.mark.parametrize(("gap", "exported"), [(0.4, "refined"), (0.6, "u")])
def test_each_part_counts_half(gap: float, exported: str) -> None:
    """By a half better where it was searched; the selection, half as large, says otherwise."""
    landscape: Any = Landscape(0, decisions=1, options=2)
    landscape.cost = torch.tensor([[0.0, 0.5]])
    at = landscape.measure_each

    def turned(found: Any, part: str, count: int | None = None) -> Any:
        values = at(found, part, count)
        return [-gap for _ in values] if part == "select" and found["d0"] == 1 else values

    landscape.measure_each = turned
    settings = RefineSettings(passes=0)
    outcome = discretize(landscape, [{"d0": 0}], {"u": {"d0": 1}}, settings, finalists=1)
    assert outcome.best_uniform == "u" and outcome.selection == pytest.approx(
        {"refined": 0, "argmax": 0, "u": -gap}
    )
    assert outcome.exported == exported
    late = discretize(
        landscape, [{"d0": 0}], {"u": {"d0": 1}}, settings, finalists=1, out_of_time=lambda: True
    )
    assert late.exported == exported


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("behind", [True, False])
def test_a_search_that_is_behind_the_best_uniform_strategy_is_refined_from_there(
    seed: int, behind: bool
) -> None:
    landscape: Any = Landscape(seed)
    uniform: Any = {f"u{k}": dict.fromkeys(landscape.names, k) for k in range(4)}
    by_cost = [
        dict(zip(landscape.names, row, strict=True)) for row in landscape.cost.sort(1).indices.T.tolist()
    ]
    worst, best = by_cost[-1], {**by_cost[0], landscape.names[0]: by_cost[1][landscape.names[0]]}
    settings = RefineSettings(passes=0, rescue_passes=1000, screen=10, alternatives=3, confidence=0.0)
    found = worst if behind else best
    outcome = discretize(landscape, [found], uniform, settings, finalists=4)
    refined = outcome.assignments["refined"]
    assert refined == (by_cost[0] if behind else best)
    nothing = RefineSettings(passes=0, rescue_passes=1)  # no time to mend anything
    outcome = discretize(landscape, [found], uniform, nothing, finalists=4)
    assert outcome.exported == (outcome.best_uniform if behind else "refined")
    before = landscape.meter.evaluations
    settings = RefineSettings(passes=0)  # none at all: nothing is measured for it either
    assert discretize(landscape, [worst], {}, settings, finalists=1).assignments["refined"] == worst
    assert landscape.meter.evaluations - before == 2 * len(landscape.parts["select"])


def test_equal_contenders_export_the_searched_one() -> None:
    landscape: Any = Landscape(0, options=1)
    uniform: Any = {"u": dict.fromkeys(landscape.names, 0)}
    outcome = discretize(landscape, landscape.start, uniform, MANY, finalists=2)
    assert outcome.exported == "refined" and outcome.best_uniform == "u"
    assert len(set(outcome.selection.values())) == 1


def test_without_uniform_strategies_there_is_none_to_beat() -> None:
    landscape: Any = Landscape(0)
    outcome = discretize(landscape, landscape.start, {}, MANY, finalists=2)
    assert outcome.best_uniform is None and set(outcome.selection) == {"refined", "argmax"}


def test_a_real_network_reaches_the_brute_force_neighbourhood() -> None:
    """Refined on real measurements: no single switch is better, and few of all assignments are."""
    inputs = images(24)
    space = small_space(2, THREE, skip=["0"])
    supernet = calibrated(cnn(), inputs, space=space)
    parts = {"search": [0, 1], "refine": list(range(4, 16)), "select": list(range(16, 24))}
    evaluator = evaluator_of(supernet, inputs, parts)
    settings = RefineSettings(passes=500, screen=12, alternatives=2, confidence=0.0)
    found, _ = refine(evaluator, supernet.argmax(), settings)
    names = list(supernet.decisions)
    every = [
        dict(zip(names, chosen, strict=True)) for chosen in itertools.product(range(3), repeat=len(names))
    ]
    scores = [evaluator.measure(assignment, "refine") for assignment in every]
    reached = evaluator.measure(found, "refine")
    single = [evaluator.measure({**found, name: k}, "refine") for name in names for k in range(3)]
    assert reached <= min(single)
    assert sum(score < reached for score in scores) <= 0.05 * len(scores)

    uniform = dict(uniform_assignments(supernet))
    outcome = discretize(evaluator, [supernet.argmax()], uniform, settings, finalists=len(uniform))
    best = min(uniform, key=lambda name: evaluator.measure(uniform[name], "refine"))
    assert outcome.best_uniform == best
    exported = outcome.assignments[outcome.exported]
    assert evaluator.measure(exported, "select") <= evaluator.measure(uniform[best], "select")

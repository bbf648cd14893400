"""Uniform strategies: every pair, followed as nearly as each layer can; and their screening."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from dqss.mixed import MixedQuantizer
from dqss.space import Rule, SearchSpace
from dqss.spec import Candidate, PerChannel, PerTensor, QuantSpec
from dqss.supernet import Supernet
from dqss.uniform import screen, shown_effects, uniform_assignments
from tests.support.nets import THREE, small_space


def weight(name: str, bits: int = 4) -> Candidate:
    return Candidate.of(name, QuantSpec(bits, True, PerChannel(0)))


def activation(name: str, bits: int = 4) -> Candidate:
    return Candidate.of(name, QuantSpec(bits, False, PerTensor()))


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.Linear(2, 2))


def labels(supernet: Supernet, assignment: dict[str, int]) -> list[str]:
    """What each decision took, sorted by decision."""
    return [supernet.decisions[name].options[index].label for name, index in sorted(assignment.items())]


def test_every_pair_is_there_and_uniform() -> None:
    supernet = Supernet(network(), small_space([3, 4], THREE))
    found = uniform_assignments(supernet)
    assert len(found) == 6 * 6
    seen = set()
    for assignment in found.values():
        assert set(assignment) == set(supernet.decisions)
        chosen = labels(supernet, assignment)
        assert len(set(chosen[0::2])) == len(set(chosen[1::2])) == 1  # activation, weight, activation ...
        seen.add((chosen[0], chosen[1]))
    every = [option.label for option in supernet.decisions["0.weight"].options]
    assert seen == set(itertools.product(every, every))


def test_channel_axis_does_not_make_another_algorithm() -> None:
    space = SearchSpace("c", (Rule((weight("minmax"),), (weight("mse"),)),))
    found = uniform_assignments(Supernet(network(), space))
    assert list(found) == ["W minmax@4 symmetric channel / A mse@4 symmetric channel"]


def test_a_layer_at_other_bits_takes_the_same_algorithm_at_its_own() -> None:
    narrow = Rule((weight("minmax"), weight("mse")), (activation("minmax"), activation("mse")))
    wide = Rule(
        (weight("mse", 8), weight("minmax", 6), weight("minmax", 8)),
        (activation("mse", 8), activation("minmax", 8)),
        names=("0",),
    )
    supernet = Supernet(network(), SearchSpace("mixed", (wide, narrow)))
    found = uniform_assignments(supernet)
    name = "W minmax@4 symmetric channel / A mse@4 affine tensor"
    assert labels(supernet, found[name]) == ["mse@8", "minmax@6", "mse@4", "minmax@4", "mse@4", "minmax@4"]
    assert all(set(assignment) == set(supernet.decisions) for assignment in found.values())


def test_a_pair_that_some_layer_cannot_follow_is_left_out() -> None:
    rest = Rule((weight("minmax"), weight("mse")), (activation("minmax"), activation("mse")))
    poor = Rule((weight("minmax"),), (activation("minmax"), activation("mse")), names=("2",))
    supernet = Supernet(network(), SearchSpace("poor", (poor, rest)))
    found = uniform_assignments(supernet)
    assert sorted(found) == [
        "W minmax@4 symmetric channel / A minmax@4 affine tensor",
        "W minmax@4 symmetric channel / A mse@4 affine tensor",
    ]
    apart = Rule((weight("lp"),), (activation("minmax"),), names=("2",))
    nothing = SearchSpace("none", (apart, Rule((weight("mse"),), (activation("mse"),))))
    assert uniform_assignments(Supernet(network(), nothing)) == {}


def test_parameters_of_an_algorithm_make_another() -> None:
    algorithms = [{"name": "percentile", "p": p} for p in (90.0, 99.0, 99.9)]
    supernet = Supernet(network(), small_space(4, algorithms))
    assert len(uniform_assignments(supernet)) == 9


@pytest.mark.parametrize("role", ["weight", "activation"])
def test_one_sided_search_spaces(role: str) -> None:
    rule = Rule((weight("minmax"), weight("mse"))) if role == "weight" else Rule((), (activation("minmax"),))
    supernet = Supernet(network(), SearchSpace("one", (rule,)))
    found = uniform_assignments(supernet)
    assert len(found) == (2 if role == "weight" else 1)
    assert all(len(assignment) == 3 for assignment in found.values())


class Scored:
    """An evaluator whose truth is known: a score for each name, blurred where few images are read."""

    def __init__(self, truth: dict[str, float], blur: float, images: int) -> None:
        self.truth, self.blur, self.images = truth, blur, images
        self.parts = {"refine": list(range(images))}
        self.calls: list[int] = []
        self.generator = torch.Generator().manual_seed(3)

    def measure(self, assignment: dict[str, int], part: str, count: int | None = None) -> float:
        assert part == "refine"
        read = min(count or self.images, self.images)
        self.calls.append(read)
        noise = self.blur / read**0.5 * float(torch.randn((), generator=self.generator))
        return self.truth[str(assignment["which"])] + noise


def test_screening_keeps_the_best_where_differences_are_large_and_costs_little() -> None:
    truth = {str(k): 1.0 + 0.05 * k for k in range(64)}
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    uniform = {str(k): {"which": k} for k in order}
    evaluator = Scored(truth, blur=0.1, images=1024)
    names = screen(evaluator, uniform, finalists=4).names  # type: ignore[arg-type]
    assert names[0] == "0" and len(names) == 4
    assert evaluator.calls == [16] * 64 + [64] * 16 + [1024] * 4
    assert sum(evaluator.calls) * 10 < 64 * 1024


@pytest.mark.parametrize("count", [1, 3, 4, 5, 9])
def test_screening_a_few(count: int) -> None:
    uniform = {str(k): {"which": k} for k in reversed(range(count))}
    evaluator = Scored({str(k): float(k) for k in range(count)}, blur=0.0, images=8)
    names = screen(evaluator, uniform, finalists=4).names  # type: ignore[arg-type]
    assert names == [str(k) for k in range(min(count, 4))]


def test_quantizers_of_a_supernet_are_what_is_chosen_among() -> None:
    supernet = Supernet(network(), small_space(4, THREE))
    for quantizer in supernet.quantizers():
        assert isinstance(quantizer, MixedQuantizer)
        assert [quantizer[k].candidate for k in range(3)] == list(quantizer.decision.options)


def test_what_uniform_strategies_show_of_each_option() -> None:
    """Of an additive distance: the differences of options, shared by all decisions of their kind."""
    supernet = Supernet(network(), small_space(4, THREE))
    uniform = uniform_assignments(supernet)
    parts = {"weight": [0.3, 0.0, 0.9], "activation": [0.0, 6.0, 1.2]}
    roles = {name: name.rpartition(".")[2] for name in supernet.decisions}
    count = Counter(roles.values())

    def score(assignment: Mapping[str, int]) -> float:
        return 1.0 + sum(parts[roles[name]][k] / count[roles[name]] for name, k in assignment.items())

    shown = shown_effects(supernet, uniform, {name: score(found) for name, found in uniform.items()})
    assert sorted(shown) == sorted(supernet.decisions)
    for name, effect in shown.items():
        wanted = torch.tensor(parts[roles[name]], dtype=torch.float64) / count[roles[name]]
        torch.testing.assert_close(effect, wanted)


def test_strategies_that_give_no_number_are_as_bad_as_the_worst() -> None:
    supernet = Supernet(network(), small_space(4, THREE))
    uniform = uniform_assignments(supernet)
    scores = {name: 1.0 + k for k, name in enumerate(uniform)}
    first = next(iter(uniform))
    wanted = shown_effects(supernet, uniform, {**scores, first: max(scores.values())})
    for bad in (math.inf, math.nan):
        found = shown_effects(supernet, uniform, {**scores, first: bad})
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert shown_effects(supernet, uniform, dict.fromkeys(scores, math.nan)) == {}


def test_of_options_that_no_strategy_has_nothing_is_shown() -> None:
    supernet = Supernet(network(), small_space(4, THREE))
    uniform = {name: a for name, a in uniform_assignments(supernet).items() if 2 not in a.values()}
    shown = shown_effects(supernet, uniform, {name: 1.0 + k for k, name in enumerate(uniform)})
    for effect in shown.values():
        assert torch.isnan(effect).tolist() == [False, False, True]


def test_one_that_is_left_over_is_not_measured_again() -> None:
    uniform = {str(k): {"which": k} for k in range(4)}
    evaluator = Scored({str(k): float(k) for k in range(4)}, blur=0.0, images=64)
    found = screen(evaluator, uniform, finalists=1, first=2)  # type: ignore[arg-type]
    assert found.names == ["0"] and evaluator.calls == [2] * 4
    assert found.scores == {str(k): float(k) for k in range(4)}

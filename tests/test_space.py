"""Rules, patterns and types: what a search space matches, and what it refuses."""

import subprocess
import sys

import pytest

from dqss.errors import SearchSpaceError
from dqss.space import LayerInfo, Rule, SearchSpace
from dqss.spec import Candidate, PerChannel, PerGroup, PerTensor, QuantSpec

LAYERS = [
    LayerInfo("stem", ("Conv2d", "_ConvNd", "Module"), 0, -3),
    LayerInfo("blocks.0.up", ("ConvTranspose2d", "_ConvNd", "Module"), 1, -3),
    LayerInfo("blocks.1.fc", ("MyLinear", "Linear", "Module"), 0, -1),
]
CHANNEL = Candidate.of("minmax", QuantSpec(4, True, PerChannel(0)))
TENSOR = Candidate.of("minmax", QuantSpec(4, False, PerTensor()))
GROUP = Candidate.of("mse", QuantSpec(4, True, PerGroup(32)))


def chosen(*rules: Rule) -> list[str]:
    space = SearchSpace("test", rules)
    space.check(LAYERS)
    return [layer.name for layer in LAYERS if space.candidates(layer) is not None]


def test_first_matching_rule_decides() -> None:
    both = Rule((CHANNEL,), (TENSOR,))
    assert chosen(both) == ["stem", "blocks.0.up", "blocks.1.fc"]
    assert chosen(Rule(names=("stem",), skip=True), both) == ["blocks.0.up", "blocks.1.fc"]
    assert chosen(both, Rule(names=("stem",), skip=True)) == ["stem", "blocks.0.up", "blocks.1.fc"]
    force = Rule((CHANNEL,), names=("blocks.1.*",))
    assert chosen(force, Rule(types=("Linear", "Conv2d"), skip=True), both) == ["blocks.0.up", "blocks.1.fc"]
    assert chosen(Rule((CHANNEL,), names=("blocks.?.*",), types=("_ConvNd",))) == ["blocks.0.up"]


def test_channel_axis_is_the_layers_own() -> None:
    space = SearchSpace("test", (Rule((CHANNEL, TENSOR), (CHANNEL,)),))
    axes = []
    for layer in LAYERS:
        found = space.candidates(layer)
        assert found is not None and found.weight[1] == TENSOR
        axes.append((found.weight[0].spec.granularity.axis, found.activation[0].spec.granularity.axis))
    assert axes == [(0, -3), (1, -3), (0, -1)]


def test_group_axis_is_the_layers_own_and_its_size_stays() -> None:
    space = SearchSpace("test", (Rule((GROUP,), (TENSOR,)),))
    found = [space.candidates(layer) for layer in LAYERS]
    assert [c.weight[0].spec.granularity for c in found if c] == [PerGroup(32, axis) for axis in (0, 1, 0)]


def test_same_choice_of_two_layers_has_the_same_kind() -> None:
    kinds = {Candidate.of("minmax", QuantSpec(4, True, PerChannel(axis))).kind for axis in (0, 1, -1)}
    assert kinds == {CHANNEL.kind} and TENSOR.kind != CHANNEL.kind
    specs = [QuantSpec(4, True), QuantSpec(4, True, signed=False), QuantSpec(4, False)]
    specs += [QuantSpec(4, True, grain) for grain in (PerChannel(0), PerGroup(16), PerGroup(32))]
    different = [Candidate.of("mse", spec) for spec in specs]
    assert len({c.kind for c in different}) == len({c.title for c in different}) == len(specs)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((Rule((CHANNEL,), names=("stm",)),), r"no layer matches 'stm' \(did you mean 'stem'\?\)"),
        ((Rule(names=("head*",), skip=True), Rule((CHANNEL,))), r"no layer matches 'head\*'"),
        ((Rule((CHANNEL,), types=("Lineer",)),), r"no layer is a 'Lineer' \(did you mean 'Linear'\?\)"),
        ((Rule(skip=True), Rule((CHANNEL,))), r"matches none of the model's 3 layers"),
        ((Rule((CHANNEL, CHANNEL)),), r"the same candidate twice: minmax@4"),
        ((Rule((CHANNEL,), (CHANNEL, GROUP)),), r"mse@4 symmetric group 32 .* layer 'stem': groups are for"),
        (
            (Rule((GROUP, Candidate.of("mse", QuantSpec(4, True, PerGroup(32, 5))))),),
            r"twice: mse@4 .*group 32",
        ),
        ((Rule(((Candidate.of("minmax", QuantSpec(4, True, PerChannel(1)))), CHANNEL)),), r"twice"),
    ],
)
def test_mistakes_are_refused_in_one_line(rules: tuple[Rule, ...], message: str) -> None:
    with pytest.raises(SearchSpaceError, match=message) as caught:
        chosen(*rules)
    assert "\n" not in str(caught.value)


def test_twins_are_named_themselves() -> None:
    other = Candidate.of("mse", QuantSpec(4, True, PerTensor()))
    space = SearchSpace("test", (Rule((other, CHANNEL, CHANNEL)),))
    with pytest.raises(SearchSpaceError, match="twice: minmax@4"):
        space.check(LAYERS)


def test_needs_no_torch() -> None:
    script = "import sys, dqss.space; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

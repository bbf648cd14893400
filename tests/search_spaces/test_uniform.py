"""The uniform search space: algorithms x bits, for all layers but those that are skipped."""

import itertools
from typing import Any

import pytest

from dqss.errors import SearchSpaceError
from dqss.observers import ALGORITHMS, build
from dqss.space import LayerCandidates, LayerInfo, SearchSpace
from dqss.spec import PerChannel, PerGroup, PerTensor
from search_spaces import uniform

LAYERS = [
    LayerInfo("stem", ("Conv2d", "_ConvNd", "Module"), 0, -3),
    LayerInfo("body.up", ("ConvTranspose2d", "_ConvNd", "Module"), 1, -3),
    LayerInfo("head", ("Linear", "Module"), 0, -1),
]


def of(space: SearchSpace, layer: LayerInfo = LAYERS[0]) -> LayerCandidates:
    found = space.candidates(layer)
    assert found is not None
    return found


def test_default_is_four_bits_per_channel_symmetric_and_per_tensor_affine() -> None:
    space = uniform()
    space.check(LAYERS)
    for layer in LAYERS:
        found = of(space, layer)
        for candidate in found.weight:
            assert candidate.spec.bits == 4 and candidate.spec.symmetric
            assert candidate.spec.granularity == PerChannel(layer.weight_axis)
        for candidate in found.activation:
            assert candidate.spec.bits == 4 and not candidate.spec.symmetric
            assert candidate.spec.granularity == PerTensor()
        for candidates in (found.weight, found.activation):
            assert len(set(candidates)) == len(candidates) >= 5
            names = {build(candidate).name for candidate in candidates}
            assert {"minmax", "percentile", "mse", "lp", "aciq_gaussian", "aciq_laplace"} <= names


def test_every_algorithm_at_every_bit_width() -> None:
    algorithms: list[Any] = ["minmax", {"name": "percentile", "p": 99.0}, {"name": "lp", "p": 3.0}]
    found = of(uniform([2, 8], 5, algorithms, ["mse"])).weight
    wanted = itertools.product(("minmax", "percentile(p=99)", "lp(p=3)"), (2, 8))
    assert sorted((c.method, c.spec.bits) for c in found) == sorted(wanted)
    assert [c.label for c in of(uniform([2, 8], 5, algorithms, ["mse"])).activation] == ["mse@5"]


def test_all_algorithms_can_be_named() -> None:
    found = of(uniform(weight_algorithms=sorted(ALGORITHMS)))
    assert [build(candidate).name for candidate in found.weight] == sorted(ALGORITHMS)


def test_granularity_and_sign_are_free() -> None:
    found = of(
        uniform(
            weight_granularity="tensor",
            activation_granularity="channel",
            weight_symmetric=False,
            activation_symmetric=True,
        )
    )
    assert {(c.spec.granularity, c.spec.symmetric) for c in found.weight} == {(PerTensor(), False)}
    assert {(c.spec.granularity, c.spec.symmetric) for c in found.activation} == {(PerChannel(-3), True)}


def test_several_kinds_of_grid_at_once() -> None:
    found = of(
        uniform(
            weight_bits=[2, 4],
            weight_algorithms=["minmax", "mse"],
            activation_algorithms=["minmax", "mse"],
            weight_granularity=["channel", "group"],
            weight_group_size=[16, 64],
            weight_symmetric=[True, False],
            activation_granularity=["tensor", "channel"],
            activation_symmetric=[True, False],
            activation_signed=[True, False],
        ),
        LAYERS[1],
    )
    grains = ("channel", "group 16", "group 64")
    wanted = itertools.product(("minmax", "mse"), (2, 4), ("symmetric", "affine"), grains)
    titles = [c.title for c in found.weight]
    assert sorted(titles) == sorted(f"{name}@{bits} {sign} {grain}" for name, bits, sign, grain in wanted)
    assert {c.spec.granularity for c in found.weight} == {PerChannel(1), PerGroup(16, 1), PerGroup(64, 1)}
    signs = ("symmetric", "unsigned symmetric", "affine")
    wanted_activations = itertools.product(("minmax", "mse"), signs, ("tensor", "channel"))
    titles = [c.title for c in found.activation]
    assert sorted(titles) == sorted(f"{name}@4 {sign} {grain}" for name, sign, grain in wanted_activations)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_granularity": "group"}, "activation_granularity: groups are for weights"),
        ({"activation_granularity": ["tensor", "group"]}, "groups are for weights"),
        ({"activation_signed": False}, "set activation_symmetric=true too"),
        ({"activation_signed": [True, False]}, "set activation_symmetric=true too"),
        ({"weight_granularity": "group", "weight_group_size": 0}, "weight_group_size=0: expected an integer"),
        ({"weight_granularity": "group", "weight_group_size": [8, 2.5]}, "weight_group_size=2.5"),
        ({"weight_granularity": []}, "expected at least one"),
        ({"weight_granularity": "group", "weight_group_size": []}, "expected at least one"),
        ({"activation_symmetric": []}, "expected at least one"),
        ({"activation_symmetric": True, "activation_signed": []}, "at least one"),
        ({"products": "no"}, "products='no': expected true or false"),
        ({"products": True, "activation_granularity": "channel"}, "products are quantized per tensor"),
        ({"weight_symmetric": [True, True], "weight_granularity": ["group", "group"]}, "twice: .* group 32"),
    ],
)
def test_grids_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchSpaceError, match=message) as caught:
        of(uniform(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "searched"),
    [
        ({}, ["stem", "body.up", "head"]),
        ({"skip": ["stem", "head"]}, ["body.up"]),
        ({"skip": ["*e*"]}, ["body.up"]),
        ({"skip_types": ["_ConvNd"]}, ["head"]),
        ({"skip_types": ["_ConvNd"], "force": ["stem"]}, ["stem", "head"]),
        ({"skip": ["*"], "force": ["body.*"]}, ["body.up"]),
    ],
)
def test_skip_and_force(options: dict[str, Any], searched: list[str]) -> None:
    space = uniform(**options)
    space.check(LAYERS)
    assert [layer.name for layer in LAYERS if space.candidates(layer) is not None] == searched


@pytest.mark.parametrize("bits", [1, 17, 0, -4, [4, 1], "4"])
def test_bits_out_of_range_are_refused(bits: Any) -> None:
    for options in ({"weight_bits": bits}, {"activation_bits": bits}):
        with pytest.raises(SearchSpaceError, match=r"bits=.*from 2 to 16"):
            uniform(**options)


def test_unknown_words_are_refused_with_what_is_known() -> None:
    with pytest.raises(SearchSpaceError, match=r"granularity 'chanel': expected .*tensor.*channel"):
        uniform(weight_granularity="chanel")
    with pytest.raises(SearchSpaceError, match=r"unknown algorithm 'min_max' \(did you mean 'minmax'\?\)"):
        build(of(uniform(weight_algorithms=["min_max"])).weight[0])
    with pytest.raises(SearchSpaceError, match=r"'percentile' has no parameter 'q'"):
        build(of(uniform(weight_algorithms=[{"name": "percentile", "q": 9.0}])).weight[0])


def test_edges_have_the_same_algorithms_at_their_own_bits() -> None:
    space = uniform(4, 3, ["minmax", "mse"], ["percentile"], edges=["stem", "head"])
    space.check(LAYERS)
    inner, edge = of(space, LAYERS[1]), of(space, LAYERS[0])
    assert {c.spec.bits for c in (*edge.weight, *edge.activation)} == {8}
    assert {c.spec.bits for c in inner.weight} == {4} and {c.spec.bits for c in inner.activation} == {3}
    for role in ("weight", "activation"):
        one, two = getattr(edge, role), getattr(inner, role)
        assert [(c.method, c.spec.symmetric) for c in one] == [(c.method, c.spec.symmetric) for c in two]
    wide = uniform(4, 4, ["mse"], ["mse"], edges=["head"], edge_bits=[4, 8])
    assert [c.spec.bits for c in of(wide, LAYERS[2]).weight] == [4, 8]
    assert [c.spec.bits for c in of(wide, LAYERS[0]).weight] == [4]


def test_what_is_skipped_is_no_edge() -> None:
    space = uniform(4, 4, edges=["stem"], skip=["stem"])
    assert space.candidates(LAYERS[0]) is None
    with pytest.raises(SearchSpaceError, match="no layer matches 'stme'"):
        uniform(4, 4, edges=["stme"]).check(LAYERS)
    with pytest.raises(SearchSpaceError, match="bits=1"):
        uniform(4, 4, edges=["stem"], edge_bits=1)

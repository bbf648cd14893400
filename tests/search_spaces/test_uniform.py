"""The uniform search space: algorithms x bits, for all layers but those that are skipped."""

import itertools
from typing import Any

import pytest

from dqss.errors import SearchSpaceError
from dqss.observers import ALGORITHMS, build
from dqss.space import LayerCandidates, LayerInfo, SearchSpace
from dqss.spec import PerChannel, PerTensor
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

"""The studies of super-resolution: what they compare is what they say."""

from itertools import product

import pytest

from dqss.quantizers import LEARNED
from dqss.space import LayerInfo
from experiments.sr_rlfn import qat, run

MOVING = (None, run.Moving(), run.Moving((8, 16)), run.Moving((8, 16), 0.25))


def layer(name: str) -> LayerInfo:
    return LayerInfo(name, ("Conv2d", "_ConvNd", "Module"), 0, -3)


@pytest.mark.parametrize("edges", [8, 4])
def test_bits_of_edges_and_of_all_others(edges: int) -> None:
    space = run.space(4, edges)
    for name, bits in (("conv_1", edges), ("block_1.c1_r", 4), ("upsampler.0", edges)):
        found = space.candidates(layer(name))
        assert found is not None and len(found.weight) == 8 and len(found.activation) == 9
        assert {c.spec.bits for c in (*found.weight, *found.activation)} == {bits}


def test_rows_of_other_settings_have_other_names() -> None:
    every = list(product(("output", "picture"), (False, True), (run.PATCH, 64), (False, True), MOVING))
    assert len({run.suffix_of(*settings) for settings in every}) == len(every) == 64
    assert run.suffix_of("output", False, run.PATCH, False) == ""


def test_more_candidates_are_those_of_before_and_one_of_each() -> None:
    fewer, more = (run.space(6, 8, more).candidates(layer("block_1.c1_r")) for more in (False, True))
    assert fewer is not None and more is not None
    assert [c.algorithm for c in more.weight[len(fewer.weight) :]] == ["adaround"]
    assert [c.algorithm for c in more.activation[len(fewer.activation) :]] == ["hessian"]


def test_pairs_of_one_algorithm() -> None:
    grids = "W {}@4 symmetric channel / A {}@4 affine tensor"
    for pair in (("mse", "mse"), ("percentile(p=97.0)", "percentile(p=99.9)")):
        assert run.alike(grids.format(*pair)) and run.alike(f"W {pair[0]}@4 / A {pair[1]}@4")
    assert not run.alike(grids.format("mse", "minmax"))


def test_uniform_rows_train_as_many_steps_as_searched_ones() -> None:
    whole = qat.settings_of("uniform_lsq", 16.7)
    assert whole.epochs == 16.7 and whole.tune_epochs == 0
    for name in qat.SHARES:
        parts = qat.settings_of(name, 16.7)
        assert 0 < parts.epochs < parts.tune_epochs
        assert parts.epochs + parts.tune_epochs == pytest.approx(16.7)
        assert (whole.learning_rate, whole.batch_size) == (parts.learning_rate, parts.batch_size)


def test_every_uniform_pair_is_in_what_is_searched() -> None:
    for weight, activation in qat.UNIFORM.values():
        assert weight in qat.WEIGHTS and activation in qat.INPUTS
    assert {"lsq", "lsq_plus", "pams", "dorefa"} <= set(LEARNED)

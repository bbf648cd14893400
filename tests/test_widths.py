"""Studies that move bits: what they may spend, and that bits move at all."""

import pytest
import torch

from dqss.budget.workload import watch
from dqss.space import LayerInfo
from experiments.repair.starts import WIDTHS, Weights, space
from experiments.sr_rlfn import run
from experiments.widths import same_mean
from tests.support.nets import calibrated, cnn, images, small_space


@pytest.mark.parametrize("edges", [(), ("0", "6")])
def test_the_uniform_strategy_spends_all_of_it_and_one_more_bit_is_too_much(edges: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    widths = [3, 4, 5]
    supernet = calibrated(cnn(), images(4), space=small_space(widths, ["minmax"], edges=edges))
    budget = same_mean(supernet.model, images(1), (4, 5), edges)
    limits = budget.on(supernet, watch(supernet, images(1)))
    uniform = {}
    for name, decision in supernet.decisions.items():
        layer, role = name.rsplit(".", 1)
        wanted = 8 if layer in edges else {"weight": 4, "activation": 5}[role]
        uniform[name] = [option.spec.bits for option in decision.options].index(wanted)
    assert limits.hold(uniform)
    for name, decision in supernet.decisions.items():
        if uniform[name] + 1 < len(decision.options):
            assert not limits.hold({**uniform, name: uniform[name] + 1})


@pytest.mark.parametrize("inputs", [4, 8])
def test_bits_of_all_but_edges_move(inputs: int) -> None:
    """Inputs of eight bits stay: there is nothing to gain."""
    found = space((4, inputs), ("first",), Weights.WIDTHS, affine=True)
    inner, edge = (found.candidates(LayerInfo(name, ("Conv2d",), 0, -3)) for name in ("inner", "first"))
    assert inner is not None and edge is not None
    assert tuple(c.spec.bits for c in inner.weight) == WIDTHS
    assert tuple(c.spec.bits for c in inner.activation) == (WIDTHS if inputs == 4 else (8,))
    assert [c.spec.bits for c in (*edge.weight, *edge.activation)] == [8, 8]
    assert not any(c.spec.symmetric for c in inner.weight)


def test_edges_of_super_resolution_move_where_they_have_as_many_bits() -> None:
    for bits, edges in ((6, 8), (8, 8)):
        given = run.Moving().space(bits, edges)
        for name, moves in (("block_1.c1_r", True), ("conv_1", edges == bits)):
            found = given.candidates(LayerInfo(name, ("Conv2d",), 0, -3))
            assert found is not None
            widths = set(range(bits - 2, bits + 3)) if moves else {edges}
            assert {c.spec.bits for c in (*found.weight, *found.activation)} == widths

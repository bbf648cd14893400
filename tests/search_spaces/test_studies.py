"""The candidates of the studies: as many as their names say, and one space inside the next."""

import itertools

import pytest

from dqss.search_spaces import studies
from dqss.space import SearchSpace
from dqss.spec import PerChannel, PerTensor

SPACES = {2: studies.two, 4: studies.four, 8: studies.eight, 16: studies.sixteen}


def kinds(space: SearchSpace) -> tuple[set[object], set[object]]:
    (rule,) = space.rules
    return {c.kind for c in rule.weight}, {c.kind for c in rule.activation}


@pytest.mark.parametrize("count", SPACES)
def test_as_many_as_the_name_says_on_the_grids_that_are_promised(count: int) -> None:
    (rule,) = SPACES[count](4, 8).rules
    for candidates, bits, symmetric, kind in (
        (rule.weight, 4, True, PerChannel),
        (rule.activation, 8, False, PerTensor),
    ):
        assert len({c.kind for c in candidates}) == len(candidates) == count
        assert {c.spec.bits for c in candidates} == {bits}
        assert {(c.spec.symmetric, type(c.spec.granularity)) for c in candidates} == {(symmetric, kind)}


def test_one_space_contains_the_next() -> None:
    found = [kinds(SPACES[count](4)) for count in (2, 4, 8, 16)]
    for smaller, larger in itertools.pairwise(found):
        assert all(few < many for few, many in zip(smaller, larger, strict=True))


def test_names_say_the_bits() -> None:
    assert studies.eight(4).name == "studies.eight(4)" == studies.eight(4, 4).name
    assert studies.two(4, 8).name == "studies.two(4, 8)"

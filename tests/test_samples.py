"""Taking inputs apart and putting them together again."""

from collections import UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dqss.errors import DataError
from dqss.samples import Samples, split

IMAGES = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(10)
Pair = namedtuple("Pair", "left right")


def batches(size: int) -> Any:
    return (IMAGES[start : start + size] for start in range(0, 10, size))


@pytest.mark.parametrize(
    "inputs",
    [IMAGES, IMAGES.numpy(), [IMAGES[:7], IMAGES[7:]], batches(3), DataLoader(list(IMAGES), batch_size=4)],
    ids=["tensor", "array", "list", "generator", "loader"],
)
def test_every_form_of_inputs_gives_the_same_samples(inputs: Any) -> None:
    samples = Samples.of(inputs)
    assert len(samples) == 10 and samples.uniform and samples.targets([0]) is None
    assert torch.equal(samples.batch([9, 0, 4]), IMAGES[[9, 0, 4]])
    assert samples.bytes == IMAGES.numel() * 4


def test_a_batch_of_everything_is_the_structure_that_was_given() -> None:
    given_batch = {"x": IMAGES, "pair": (IDS, [IDS * 2, Pair(IDS, None)]), "use_cache": False, "name": "a"}
    batch = Samples.of([given_batch]).batch([3, 1])
    assert list(batch) == list(given_batch)
    assert torch.equal(batch["x"], IMAGES[[3, 1]])
    first, (second, third) = batch["pair"]
    assert first.tolist() == [3, 1] and second.tolist() == [6, 2]
    assert isinstance(third, Pair) and third.left.tolist() == [3, 1] and third.right is None
    assert batch["use_cache"] is False and batch["name"] == "a"


def test_mappings_of_other_kinds_and_a_single_mapping() -> None:
    tokens: Any = UserDict(input_ids=IDS.view(5, 2), mask=torch.ones(5, 2))
    for inputs in (tokens, [tokens]):
        samples = Samples.of(inputs)
        assert len(samples) == 5 and samples.batch([2])["input_ids"].tolist() == [[4, 5]]


def test_samples_share_memory_with_what_they_came_from() -> None:
    storage = torch.zeros(4, 2)
    samples = Samples.of(storage)
    storage[1] = 7.0
    assert samples.batch([1]).tolist() == [[7.0, 7.0]]
    samples.batch([1]).zero_()
    assert storage[1].tolist() == [7.0, 7.0]


def test_targets_stay_with_their_inputs() -> None:
    loader = DataLoader(TensorDataset(IMAGES, IDS), batch_size=4)
    samples = Samples.of(loader, labelled=True, limit=9)
    assert len(samples) == 9 and samples.labelled
    part = samples.subset([8, 2, 5])
    targets = part.targets([0, 2])
    assert targets is not None and targets.tolist() == [8, 5]
    assert torch.equal(part.batch([0, 2]), IMAGES[[8, 5]])


def test_ragged_samples_are_held_but_not_stacked() -> None:
    samples = Samples.of([torch.ones(2, 5), torch.ones(1, 7)])
    assert not samples.uniform
    assert samples.batch([2]).shape == (1, 7) and samples.batch([0, 1]).shape == (2, 5)
    with pytest.raises(DataError, match="batch_size=1"):
        samples.batch([1, 2])


def test_constants_that_differ_are_not_stacked() -> None:
    samples = Samples.of([{"x": IMAGES[:1], "flag": True}, {"x": IMAGES[1:2], "flag": False}])
    assert not samples.uniform and samples.batch([1])["flag"] is False
    with pytest.raises(DataError, match="differ"):
        samples.batch([0, 1])


def test_an_endless_generator_stops_at_the_limit() -> None:
    def endless() -> Any:
        while True:
            yield torch.zeros(3, 2)

    assert len(Samples.of(endless(), limit=7)) == 7


def test_gradients_of_inputs_are_not_kept() -> None:
    assert not Samples.of(torch.ones(2, 2, requires_grad=True)).batch([0]).requires_grad


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "empty"),
        (torch.zeros(0, 3), "empty"),
        ([(torch.zeros(2, 3), torch.zeros(3))], "leading size"),
        ([torch.tensor(1.0)], "leading size"),
        ([{"x": "text"}], "no tensor"),
        ("photos", "str"),
        (None, "NoneType"),
        (TensorDataset(IMAGES), "DataLoader"),
    ],
)
def test_inputs_that_are_not_batches_are_named(inputs: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Samples.of(inputs)
    assert "\n" not in str(caught.value)


def test_labelled_batches_must_be_pairs() -> None:
    with pytest.raises(DataError, match="pair"):
        Samples.of([IMAGES], labelled=True)


@given(
    count=st.integers(1, 400),
    weights=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5),
    total=st.floats(0.3, 1.0),
    seed=st.integers(0, 5),
)
def test_parts_are_disjoint_and_of_the_right_size(
    count: int, weights: list[float], total: float, seed: int
) -> None:
    fractions = [weight / sum(weights) * total for weight in weights]
    if count < len(fractions):
        with pytest.raises(DataError, match="at least"):
            split(count, fractions, seed)
        return
    parts = split(count, fractions, seed)
    members = [index for part in parts for index in part]
    assert len(parts) == len(fractions) and all(parts)
    assert len(set(members)) == len(members) <= count and set(members) <= set(range(count))
    assert split(count, fractions, seed) == parts
    if min(fractions) * count >= 1:
        sizes = np.array([len(part) for part in parts])
        assert np.all(np.abs(sizes - np.array(fractions) * count) < 1 + 1e-6)
        assert abs(len(members) - sum(fractions) * count) <= 0.5 + 1e-6


def test_whole_fractions_use_every_sample_and_seeds_differ() -> None:
    parts = split(100, [0.5, 0.25, 0.25], seed=0)
    assert sorted(index for part in parts for index in part) == list(range(100)) and [
        len(part) for part in parts
    ] == [50, 25, 25]
    assert split(100, [0.5, 0.25, 0.25], seed=1) != parts


def test_targets_must_be_as_many_as_inputs() -> None:
    inputs: list[Tensor] = [torch.zeros(1)] * 3
    with pytest.raises(DataError, match="2 targets for 3 inputs"):
        Samples(inputs, [torch.tensor(0)] * 2)

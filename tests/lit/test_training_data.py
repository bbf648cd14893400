"""Training batches: a function of seed and step, whoever loads them."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from dqss.lit.training_data import StepPlan, Steps, TrainingData, seeded


def noisy(items):
    """A collation that augments with every global generator."""
    inputs, targets = torch.utils.data.default_collate(items)
    noise = torch.rand(()) + random.random() + float(np.random.rand())
    return inputs + noise, targets


DATA = TrainingData(TensorDataset(torch.arange(20.0), torch.arange(20)), noisy)


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 10**6), st.integers(0, 5))
def test_every_epoch_is_a_permutation(count: int, batch_size: int, seed: int, epoch: int) -> None:
    plan = StepPlan(range(count), batch_size, seed)
    steps = range(epoch * plan.per_epoch, (epoch + 1) * plan.per_epoch)
    seen = [index for step in steps for index in plan.at(step)]
    assert len(set(seen)) == len(seen) > count - plan.size


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_or_on_where_one_begins(workers: int) -> None:
    plan = StepPlan(range(20), 6, seed=5)
    wanted = [Steps(DATA, [plan])[step] for step in range(7)]
    data = TrainingData(DATA.items, DATA.collate, workers)
    found = list(Steps(data, [plan]).loader(3, 7))
    for one, other in zip(found, wanted[3:], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_ranks_share_a_batch() -> None:
    plan = StepPlan(range(20), 6, seed=5)
    whole = Steps(DATA, [plan])[2][1]
    parts = [Steps(DATA, [plan], rank, 2)[2][1] for rank in range(2)]
    assert torch.equal(torch.stack(parts, 1).flatten(), whole)


def test_outside_of_a_seeded_block_the_generators_go_on() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    assert draw() == first
    with seeded(3, 4):
        inside = draw()
    assert draw() == second
    with seeded(3, 4):
        assert draw() == inside
    with seeded(3, 5):
        assert draw() != inside


def test_of_a_loader_its_dataset_and_collation_are_taken() -> None:
    data = TrainingData.of(DataLoader(DATA.items, batch_size=3, collate_fn=noisy))
    assert data.items is DATA.items and data.collate is noisy and len(data) == 20
    inputs, targets = torch.rand(4, 2), torch.arange(4)
    batch = TrainingData.of((inputs, targets)).batch([2, 0])
    assert torch.equal(batch[0], inputs[[2, 0]]) and torch.equal(batch[1], targets[[2, 0]])

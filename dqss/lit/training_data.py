"""Training batches as a pure function of (seed, step), whatever the dataset, its workers and its ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from dqss.errors import DataError
from dqss.samples import Samples

Batch = tuple[Any, Tensor | None]


@dataclass(frozen=True)
class TrainingData:
    """Labelled (or not) inputs to train with, one at a time, and how a batch is made of them.

    Attributes:
        items: map-style dataset.
        collate: items to ``(inputs, targets)``; targets may be None. Augmentation may draw from the
            global generators of torch, numpy and Python: they are seeded for each step.
        workers: processes that load; the batches are the same for any number.
    """

    items: Dataset[Any]
    collate: Callable[[list[Any]], Any] = default_collate
    workers: int = 0

    def __len__(self) -> int:
        """Number of items."""
        return len(cast("Sized", self.items))

    @classmethod
    def of(cls, given: Any) -> TrainingData:
        """From whatever training data comes in.

        Args:
            given: a DataLoader (its dataset, collation and workers; order and batch size are ours), a
                map-style dataset of pairs, :class:`Samples`, or two tensors ``([N, ...], [N, ...])``.

        Raises:
            DataError: for anything else, and for nothing to train with.
        """
        if isinstance(given, cls):
            found = given
        elif isinstance(given, DataLoader):
            found = cls(given.dataset, given.collate_fn, given.num_workers)
        elif isinstance(given, Samples):
            found = cls(_SampleItems(given), _SampleItems.collate)
        elif isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Tensor):
            inputs, targets = given
            if len(inputs) != len(targets):
                raise DataError(f"training data: {len(inputs)} inputs and {len(targets)} targets")
            found = cls(_SampleItems(Samples(list(inputs), list(targets))), _SampleItems.collate)
        elif isinstance(given, Dataset):
            found = cls(given)
        else:
            raise DataError(
                f"training data is a {type(given).__name__}: expected a DataLoader, a dataset of pairs "
                "(input, target), or a pair of tensors"
            )
        if isinstance(found.items, IterableDataset) or not hasattr(found.items, "__len__"):
            raise DataError("training data must be a dataset with a length, whose items have numbers")
        if len(found) == 0:
            raise DataError("training data: the dataset is empty")
        return found

    def batch(self, indices: Sequence[int]) -> Batch:
        """The batch of ``indices``; the global generators decide about augmentation."""
        made = self.collate([self.items[index] for index in indices])
        if isinstance(made, tuple | list) and len(made) == 2:
            return made[0], made[1]
        return made, None


class _SampleItems(Dataset[Any]):
    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Samples, int]:
        return self.samples, index

    @staticmethod
    def collate(items: list[tuple[Samples, int]]) -> Batch:
        samples, indices = items[0][0], [index for _, index in items]
        return samples.batch(indices), samples.targets(indices)


@dataclass(frozen=True)
class StepPlan:
    """Which items each step sees: every epoch is a permutation of its own.

    What does not fill a batch is left for another epoch; a dataset smaller than a batch is one batch.

    Attributes:
        items: indices of the dataset that are used.
        batch_size: of all ranks together.
        seed: of the permutations.
    """

    items: Sequence[int]
    batch_size: int
    seed: int

    @property
    def size(self) -> int:
        """Items in a batch."""
        return min(self.batch_size, len(self.items))

    @property
    def per_epoch(self) -> int:
        """Steps in an epoch."""
        return len(self.items) // self.size

    def at(self, step: int) -> list[int]:
        """Indices of one step."""
        epoch, position = divmod(step, self.per_epoch)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.items), generator=generator)
        chosen = order[position * self.size : (position + 1) * self.size].tolist()
        return [self.items[index] for index in chosen]


class Steps(Dataset[Batch]):
    """The batches of one rank, numbered by step.

    Args:
        data: what is trained with.
        plans: taken in turn, a step each.
        rank, ranks: this process and how many there are; they share each batch.
    """

    def __init__(self, data: TrainingData, plans: Sequence[StepPlan], rank: int = 0, ranks: int = 1) -> None:
        self.data, self.plans, self.rank, self.ranks = data, list(plans), rank, ranks

    def __getitem__(self, step: int) -> Batch:
        """The batch of ``step``."""
        turn, which = divmod(step, len(self.plans))
        plan = self.plans[which]
        with seeded(plan.seed, step, self.rank):
            return self.data.batch(plan.at(turn)[self.rank :: self.ranks])

    def loader(self, first: int, last: int) -> DataLoader[Batch]:
        """Steps ``first`` to ``last - 1`` in order; its length is not told, so that any may be the first."""
        workers = self.data.workers
        return DataLoader(
            self,
            batch_size=None,
            sampler=_Range(first, last),
            num_workers=workers,
            persistent_workers=workers > 0,
        )


class _Range(Sampler[int]):
    """Lightning would take a length for that of an epoch, and resume at the wrong place."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last))


@contextmanager
def seeded(seed: int, step: int, rank: int = 0, devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Seed the global generators inside by these numbers; outside they go on as if nothing had been."""
    mixed = (seed * 1_000_003 + step) * 64 + rank
    python, numeric = random.getstate(), np.random.get_state()
    cuda = [device.index or 0 for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        # torch.manual_seed would also reseed devices that are not put back.
        for generator in (torch.default_generator, *(torch.cuda.default_generators[d] for d in cuda)):
            generator.manual_seed(mixed % 2**63)
        random.seed(mixed)
        np.random.seed(mixed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numeric)

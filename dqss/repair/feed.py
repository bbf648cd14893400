"""What units learn from: their inputs in both networks, and what they should give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqss.measure import batches, to_device
from dqss.randomness import generator_for
from dqss.repair.augment import Augmentation
from dqss.repair.cache import Rows, Store
from dqss.repair.reconstruct import Data
from dqss.repair.units import Unit, capturing
from dqss.samples import Samples

BATCH = 32
"""Inputs at a time, forward alone."""


@dataclass(frozen=True)
class Fed:
    """The network's inputs: those that are learned from, transformed copies of them, those held out.

    Attributes:
        samples: all inputs; the last ones are held out.
        own: how many of them are learned from.
        copies: transformed ones of each that is learned from.
        augment: what transforms them.
        seed: of that.
        device: where batches go.
    """

    samples: Samples
    own: int
    copies: int
    augment: Augmentation
    seed: int
    device: torch.device

    @property
    def learned(self) -> int:
        """How many are learned from, copies included; they come first."""
        return (1 + self.copies) * self.own

    @property
    def count(self) -> int:
        """Of all."""
        return len(self.samples) + self.copies * self.own

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """Inputs in the batch, and the batch."""
        count = len(self.samples)
        parts = [range(self.own), range(self.own, count)] if self.copies else [range(count)]
        for part, rows in enumerate(parts):
            for run in batches(rows, BATCH):
                yield len(run), to_device(self.samples.batch(run), self.device)
            for copy in range(0 if part else self.copies):
                for run in batches(rows, BATCH):
                    generator = generator_for(self.seed, "augmented", copy, run[0])
                    yield len(run), to_device(self.augment(self.samples.batch(run), generator), self.device)


class Feed:
    """Inputs and outputs of one unit after the other; what a unit gave is what the next one gets.

    Args:
        quantized: the network that is tuned.
        exact: the float one.
        fed: inputs of both.
        mixed: whether units also need their inputs in the float network.
        store: of what is kept.
    """

    def __init__(self, quantized: nn.Module, exact: nn.Module, fed: Fed, mixed: bool, store: Store) -> None:
        self.quantized, self.exact, self.fed = quantized, exact, fed
        self.mixed, self.store = mixed, store
        self.last: tuple[Unit, Data] | None = None

    def data(self, unit: Unit) -> Data:
        """Of ``unit``; the unit before it must be tuned for good."""
        last, mixed = self.last, self.mixed
        if last is not None and unit.follows == last[0].name:
            exact = last[1].wanted
            quantized = self._run(self.quantized, last[0], last[1].quantized)
            wanted = self._run(self.exact, unit, exact)
            self._free(last[1].quantized, last[1].exact, None if mixed else exact)
        else:
            if last is not None:
                self._free(last[1].quantized, last[1].exact, last[1].wanted)
            quantized = self._collect(self.quantized, unit, True, False)[0]
            exact, wanted = self._collect(self.exact, unit, mixed, True)
        learned = self.fed.learned * (len(wanted) // self.fed.count)
        data = Data(quantized, exact if mixed else None, wanted, learned)
        self.last = unit, data
        return data

    @torch.no_grad()
    def _collect(self, network: nn.Module, unit: Unit, given: bool, made: bool) -> tuple[Any, Any]:
        inputs, outputs = Rows(self.store, self.fed.count), Rows(self.store, self.fed.count)
        size = 0

        def keep(rows: Rows) -> Any:
            return lambda tensor: rows.add(tensor, size)

        chosen = (keep(inputs) if given else None, keep(outputs) if made else None)
        with capturing(network, unit, *chosen) as run:
            for size, batch in self.fed:  # noqa: B007, keep() reads it
                run(batch)
        return inputs.tensor if given else None, outputs.tensor if made else None

    @torch.no_grad()
    def _run(self, network: nn.Module, unit: Unit, rows: Tensor) -> Tensor:
        made = Rows(self.store, len(rows))
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH].to(self.fed.device, copy=True)
            made.add(unit.run(network, batch), len(batch))
        return made.tensor

    def _free(self, *tensors: Tensor | None) -> None:
        for tensor in tensors:
            self.store.free(tensor)

"""A small in-memory set of model inputs, indexed one sample at a time.

A *tree* is a tensor, or a tuple, list or mapping of trees; what is not a tensor is a constant
of the sample (a flag, None) and is handed to the model as it is.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, IterableDataset

from dqss.errors import DataError


class Samples:
    """Model inputs without their batch dimension, optionally with targets.

    Samples are views of the batches that they came from, not copies. They may differ in shape
    from one another; then only batches of one can be made.

    Args:
        inputs: one tree a sample.
        targets: one tensor a sample, or None for an unlabelled set.

    Raises:
        DataError: if ``inputs`` is empty, or ``targets`` are not as many.
    """

    def __init__(self, inputs: Sequence[Any], targets: Sequence[Tensor] | None = None) -> None:
        if not inputs:
            raise DataError("the inputs are empty: give at least one batch of them")
        if targets is not None and len(targets) != len(inputs):
            raise DataError(f"{len(targets)} targets for {len(inputs)} inputs: expected one for each")
        self._inputs = list(inputs)
        self._targets = None if targets is None else list(targets)
        self.uniform: bool = len({_signature(sample) for sample in self._inputs}) == 1

    @classmethod
    def of(
        cls, inputs: Iterable[Any] | Tensor, *, labelled: bool = False, limit: int | None = None
    ) -> Samples:
        """Take inputs apart into samples.

        Args:
            inputs: a tensor ``[N, ...]``, a mapping of such tensors, or an iterable of batches;
                each batch is a tree whose tensors have the same leading size.
            labelled: batches are pairs ``(inputs, targets)``, targets a tensor ``[N, ...]``.
            limit: stop after so many samples (needed for endless generators).

        Raises:
            DataError: if there are no samples, or a batch is not made of tensors of equal
                leading size.
        """
        if isinstance(inputs, Samples):
            return inputs if limit is None else inputs.subset(range(min(limit, len(inputs))))
        if limit is not None and limit < 1:
            raise DataError(f"limit={limit}: expected at least one sample")
        samples: list[Any] = []
        targets: list[Tensor] = []
        for number, batch in enumerate(_batches(inputs)):
            if labelled:
                batch, labels = _pair(batch, number)
                targets.extend(_rows(labels, number)[: None if limit is None else limit - len(targets)])
            samples.extend(_rows(batch, number))
            if limit is not None and len(samples) >= limit:
                samples = samples[:limit]
                break
        return cls(samples, targets if labelled else None)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._inputs)

    @property
    def bytes(self) -> int:
        """Memory that the tensors of all samples cover."""
        trees = [*self._inputs, *(self._targets or ())]
        return sum(leaf.numel() * leaf.element_size() for tree in trees for leaf in _tensors(tree))

    @property
    def labelled(self) -> bool:
        """Whether targets are known."""
        return self._targets is not None

    def batch(self, indices: Sequence[int]) -> Any:
        """The inputs of ``indices`` as one batch: every tensor gets a leading dimension.

        Raises:
            DataError: if the samples differ in shape, structure or constants.
        """
        return _stack([self._inputs[index] for index in indices])

    def targets(self, indices: Sequence[int]) -> Tensor | None:
        """The targets of ``indices``, ``[len(indices), ...]``, or None for an unlabelled set."""
        if self._targets is None:
            return None
        stacked: Tensor = _stack([self._targets[index] for index in indices])
        return stacked

    def subset(self, indices: Iterable[int]) -> Samples:
        """The samples of ``indices``, in that order; no copy."""
        chosen = list(indices)
        targets = None if self._targets is None else [self._targets[index] for index in chosen]
        return Samples([self._inputs[index] for index in chosen], targets)


def split(count: int, fractions: Sequence[float], seed: int) -> list[list[int]]:
    """Disjoint random parts of ``range(count)``, one for each fraction, in random order inside.

    Sizes are the fractions of ``count`` rounded so that their total is right; no part is empty.
    The same arguments give the same parts.

    Raises:
        DataError: if there are fewer samples than parts.
        ValueError: if fractions are not positive or exceed 1 in total.
    """
    if not fractions or min(fractions) <= 0 or sum(fractions) > 1 + 1e-9:
        raise ValueError(f"fractions={tuple(fractions)}: expected positive numbers of at most 1 in total")
    if count < len(fractions):
        raise DataError(f"{count} calibration samples: at least {len(fractions)} are needed")
    sizes = _sizes(count, fractions)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    ends = np.cumsum(sizes).tolist()
    return [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _sizes(count: int, fractions: Sequence[float]) -> list[int]:
    """Largest-remainder rounding, then every empty part takes one from the largest."""
    exact = [fraction * count for fraction in fractions]
    sizes = [int(size + 1e-9) for size in exact]
    total = max(len(sizes), round(sum(exact)))
    by_remainder = sorted(range(len(sizes)), key=lambda part: sizes[part] - exact[part])
    for part in by_remainder[: max(0, total - sum(sizes))]:
        sizes[part] += 1
    while 0 in sizes:
        if sum(sizes) == count:
            sizes[sizes.index(max(sizes))] -= 1
        sizes[sizes.index(0)] += 1
    return sizes


def _batches(inputs: Any) -> Iterator[Any]:
    if isinstance(inputs, Tensor | np.ndarray | Mapping):
        return iter((inputs,))
    if isinstance(inputs, Dataset) and not isinstance(inputs, IterableDataset):
        raise DataError(f"{type(inputs).__name__} yields single samples: wrap it in a DataLoader")
    if isinstance(inputs, str | bytes) or not isinstance(inputs, Iterable):
        raise DataError(
            f"inputs are a {type(inputs).__name__}: expected a tensor [N, ...] or an iterable of batches"
        )
    return iter(inputs)


def _pair(batch: Any, number: int) -> tuple[Any, Tensor]:
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise DataError(f"batch {number} of the inputs is not a pair (inputs, targets)")


def _rows(batch: Any, number: int) -> list[Any]:
    """The samples of one batch."""
    sizes = {tuple(leaf.shape[:1]) for leaf in _tensors(batch)}
    if not sizes:
        raise DataError(f"batch {number} of the inputs has no tensor in it, but a {type(batch).__name__}")
    if len(sizes) > 1 or sizes == {()}:
        found = ", ".join(sorted(str(list(leaf.shape)) for leaf in _tensors(batch)))
        raise DataError(f"batch {number} of the inputs: tensors differ in leading size: {found}")
    (size,) = next(iter(sizes))
    return [_map(operator.itemgetter(row), batch) for row in range(size)]


def _map(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """The tree with ``function`` applied to its tensors."""
    if isinstance(tree, Tensor):
        return function(tree.detach())
    if isinstance(tree, np.ndarray):
        return function(torch.as_tensor(tree))
    if isinstance(tree, Mapping):
        return {key: _map(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        values = [_map(function, value) for value in tree]
        if hasattr(tree, "_fields"):
            return type(tree)(*values)
        return tuple(values) if isinstance(tree, tuple) else values
    return tree


def _tensors(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(found.append, tree)
    return found


def _signature(tree: Any) -> Any:
    """Equal for two trees exactly if they can be stacked; hashable."""
    if isinstance(tree, Tensor):
        return tuple(tree.shape), tree.dtype
    if isinstance(tree, Mapping):
        return tuple((key, _signature(value)) for key, value in tree.items())
    if isinstance(tree, tuple | list):
        return type(tree), tuple(_signature(value) for value in tree)
    return type(tree), repr(tree)


def _stack(trees: list[Any]) -> Any:
    """One batch of the trees."""
    if not trees:
        raise DataError("a batch needs at least one sample")
    if len({_signature(tree) for tree in trees}) > 1:
        shapes = sorted({str([list(leaf.shape) for leaf in _tensors(tree)]) for tree in trees})
        raise DataError(f"samples of one batch differ ({', '.join(shapes[:3])}): use batch_size=1")
    columns = iter(zip(*(_tensors(tree) for tree in trees), strict=True))
    return _map(lambda leaf: torch.stack(next(columns)), trees[0])


def inputs_sha256(samples: Samples) -> str:
    """Sha256 of all inputs and targets: types, shapes and raw bytes."""
    found = hashlib.sha256()
    for index in range(len(samples)):
        for leaf in tree_leaves((samples.batch([index]), samples.targets([index]))):
            if isinstance(leaf, torch.Tensor):
                found.update(f"{leaf.dtype} {tuple(leaf.shape)} ".encode())
                found.update(leaf.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            else:
                found.update(repr(leaf).encode())
    return found.hexdigest()

"""The network as a function of the tensors of a batch, which is what can be traced."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from dqss.calls import call_model, tensors_in


class OfTensors(nn.Module):
    """The network as a function of the batch's tensors."""

    def __init__(self, network: nn.Module, batch: Any) -> None:
        super().__init__()
        self.network = network
        leaves, self._structure = pytree.tree_flatten(batch)
        self._others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """All tensors of the network's output."""
        given = iter(tensors)
        leaves = [next(given) if other is None else other[0] for other in self._others]
        return tuple(tensors_in(call_model(self.network, pytree.tree_unflatten(leaves, self._structure))))


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch in the order of a graph's inputs."""
    return [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]


def axes(tensor: Tensor, dynamic_size: bool) -> dict[int, Any]:
    """Axes whose size is left open: the first, and of images the last two if ``dynamic_size``.

    AUTO and not a name: where the network needs a fixed size, that is no failure.
    """
    count = tensor.ndim
    openaxes = {0} | ({count - 2, count - 1} if dynamic_size and count == 4 else set())
    return {axis: Dim.AUTO for axis in openaxes if axis < count}


@contextmanager
def quietly() -> Iterator[None]:
    """Inside, torch and onnx do not report progress, and what they would rather not have seen, at length."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def first_words(error: BaseException) -> str:
    """Of the innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:160]}"

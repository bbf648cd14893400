"""How a model is called with a batch, and which tensor of its output a loss reads by default."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from dqss.errors import ModelError


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` with one batch.

    Args:
        model: any module.
        inputs: a mapping is passed as keyword arguments, a tuple or list as positional ones,
            anything else (a tensor, most often) as the only argument.

    Returns:
        Whatever the model returns.
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of a nested value, depth first: mappings, tuples, lists, dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name, None))


def first_tensor(output: Any) -> Tensor:
    """The tensor that a loss reads from a model's output unless it is told otherwise.

    A tensor is itself; then ``output.logits`` or ``output["logits"]``; then the first floating
    tensor, depth first.

    Raises:
        ModelError: for an output without a floating tensor.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if isinstance(logits, Tensor):
        return logits
    for tensor in tensors_in(output):
        if tensor.is_floating_point():
            return tensor
    raise ModelError(
        f"the model returns {type(output).__name__} without a floating tensor that a loss could read; "
        "give the loss a function that reads one from the output"
    )

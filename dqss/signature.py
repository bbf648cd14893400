"""The shapes and types of a model's inputs as JSON, and inputs made up from them.

A strategy records them, so that preparing the network again (which watches one batch go
through) needs no data of the user's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dqss.errors import StrategyError

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
    )
}


def describe_inputs(inputs: Any) -> dict[str, Any]:
    """JSON for a batch: tensors by shape and type, containers as they are, other leaves by value."""
    if isinstance(inputs, Tensor):
        return {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
    if isinstance(inputs, Mapping):
        return {"dict": {str(key): describe_inputs(value) for key, value in inputs.items()}}
    if isinstance(inputs, (tuple, list)):
        return {"tuple": [describe_inputs(value) for value in inputs]}
    return {"value": inputs if isinstance(inputs, (bool, int, float, str)) else None}


def example_inputs(signature: Mapping[str, Any]) -> Any:
    """Inputs of the shapes and types that :func:`describe_inputs` wrote down.

    Real numbers are noise (the same each time), so that branches on an input's size are taken as
    real inputs would; integers are zero, which is a valid index into anything.

    Raises:
        StrategyError: for a signature that it did not write.
    """
    match signature:
        case {"shape": [*shape], "dtype": str(name)} if name in _DTYPES:
            found = torch.zeros([int(size) for size in shape], dtype=_DTYPES[name])
            if found.is_floating_point():
                found.normal_(generator=torch.Generator().manual_seed(0))
            return found
        case {"dict": dict(entries)}:
            return {key: example_inputs(value) for key, value in entries.items()}
        case {"tuple": [*entries]}:
            return tuple(example_inputs(value) for value in entries)
        case {"value": value}:
            return value
    raise StrategyError("the strategy does not say what the model's inputs look like; search again")

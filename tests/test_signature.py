"""Inputs described as JSON, and inputs made up from the description."""

import json
from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dqss.errors import StrategyError
from dqss.signature import describe_inputs, example_inputs

dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
tensors = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype), st.lists(st.integers(0, 3), max_size=3), dtypes
)
leaves = tensors | st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-2, 2) | st.text(max_size=3)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(
            st.text(max_size=6) | st.sampled_from(["shape", "dtype", "value"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


def same(found: Any, wanted: Any) -> bool:
    """Alike but for the values of tensors: noise, or zero for integers; lists come back as tuples."""
    if isinstance(wanted, Tensor):
        alike = found.shape == wanted.shape and found.dtype == wanted.dtype
        valid = found.isfinite().all() if found.is_floating_point() else not found.any()
        return isinstance(found, Tensor) and alike and bool(valid)
    if isinstance(wanted, Mapping):
        return list(found) == list(wanted) and all(same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, (list, tuple)):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return type(found) is type(wanted) and found == wanted


@given(trees)
def test_what_was_described_comes_back(tree: Any) -> None:
    signature = json.loads(json.dumps(describe_inputs(tree)))
    assert same(example_inputs(signature), tree)


def test_named_tuples_are_positional() -> None:
    pair = namedtuple("pair", "x mask")(torch.ones(2, 3), torch.ones(2, dtype=torch.bool))
    assert same(example_inputs(describe_inputs(pair)), tuple(pair))


@pytest.mark.parametrize(
    "signature", [{}, {"shape": [1], "dtype": "complex64"}, {"shape": 3, "dtype": "float32"}, {"tuple": {}}]
)
def test_other_descriptions_are_refused(signature: dict[str, Any]) -> None:
    with pytest.raises(StrategyError, match="search again"):
        example_inputs(signature)

"""How models are called, and what a loss reads."""

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqss.calls import call_model, first_tensor, tensors_in
from dqss.errors import ModelError


class Subtract(nn.Module):
    def forward(self, a: Any, b: Any = 0) -> Any:
        return a - b


ONE, TWO = torch.tensor(1.0), torch.tensor(2.0)
Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (ONE, 1),
        ((ONE, TWO), -1),
        ([ONE, TWO], -1),
        (Pair(ONE, TWO), -1),
        ({"b": ONE, "a": TWO}, 1),
        (UserDict(b=ONE, a=TWO), 1),
        (5, 5),
    ],
)
def test_a_batch_becomes_the_models_arguments(inputs: Any, expected: float) -> None:
    assert call_model(Subtract(), inputs) == expected


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


@dataclass
class Unnamed:
    ids: Tensor
    nested: Any


@pytest.mark.parametrize(
    "output",
    [
        TWO,
        Output(ONE, TWO),
        {"loss": ONE, "logits": TWO},
        (torch.tensor(3), [TWO, ONE]),
        {"ids": torch.tensor(3), "deep": ({"x": TWO}, ONE)},
        Unnamed(torch.tensor(3), (None, "text", [TWO])),
    ],
)
def test_the_loss_reads_logits_or_the_first_floating_tensor(output: Any) -> None:
    assert first_tensor(output) is TWO


@pytest.mark.parametrize("output", [None, "text", (torch.tensor(3),), {"logits": None}])
def test_an_output_without_a_floating_tensor_is_refused(output: Any) -> None:
    with pytest.raises(ModelError, match="floating tensor"):
        first_tensor(output)


def test_tensors_come_depth_first() -> None:
    found = list(tensors_in({"a": [ONE, Unnamed(TWO, {"b": ONE})], "c": 4}))
    assert [id(tensor) for tensor in found] == [id(ONE), id(TWO), id(ONE)]

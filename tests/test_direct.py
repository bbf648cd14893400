"""Compiled loops called directly give what the long way gives, and go the long way wherever it matters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dqss.direct import key_of
from dqss.fused import SMALL, Kernel, fused


def _both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * y[:, None], (x - y[:, None]).square().sum(1)


def _one(x: Tensor, y: Tensor) -> Tensor:
    return x / y[:, None]


def arguments(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows)
    return torch.randn(rows, columns), torch.rand(rows) + 0.5


def forbidden(*args: object) -> None:
    raise AssertionError("went the long way")


@pytest.mark.parametrize("function", [_both, _one])
def test_the_second_call_goes_directly_and_gives_the_same(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(function)
    shapes = [(3, 700), (5, 900)]
    with fused(True):
        for shape in shapes:
            args = arguments(*shape)
            first = kernel(SMALL, *args)
            torch.testing.assert_close(first, function(*args))
        monkeypatch.setattr(kernel, "compiled", forbidden)
        for shape in shapes:
            args = arguments(*shape)
            again, other = kernel(SMALL, *args), kernel(SMALL, args[0] + 1, args[1])
            torch.testing.assert_close(again, function(*args))
            torch.testing.assert_close(other, function(args[0] + 1, args[1]))
            assert type(again) is type(function(*args))


def test_what_asks_for_a_gradient_gets_a_bare_result() -> None:
    """As the long way does: gradients of the loops are written by hand."""
    kernel, (x, y) = Kernel(_one), arguments(3, 700)
    with fused(True):
        kernel(SMALL, x, y)
        assert not kernel(SMALL, x.requires_grad_(), y).requires_grad


def test_strided_arguments_go_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, (x, y) = Kernel(_one), arguments(40, 40)
    with fused(True):
        kernel(SMALL, x, y)
        torch.testing.assert_close(kernel(SMALL, x.T, y), _one(x.T, y))
    assert key_of((x, y)) is not None and key_of((x.T, y)) is None


def test_a_key_tells_apart_what_is_compiled_apart() -> None:
    x, y = arguments(40, 40)
    keys = [key_of((x, y)), key_of((x[:1], y[:1])), key_of((x.to(torch.int8), y))]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        keys.append(key_of((x, y)))
    finally:
        torch.set_num_threads(threads)
    assert len(set(keys)) == len(keys)
    assert key_of((x, y)) == keys[0]


def _partly(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x * y[:, None], x


def test_results_that_are_more_than_the_codes_own_are_left_to_the_long_way() -> None:
    """An argument handed back is not among what the compiled code gives."""
    kernel, (x, y) = Kernel(_partly), arguments(3, 700)
    with fused(True):
        for _ in range(3):
            product, same = kernel(SMALL, x, y)
            torch.testing.assert_close(product, x * y[:, None])
            assert same.data_ptr() == x.data_ptr()
    assert list(kernel._direct.values()) == [None]

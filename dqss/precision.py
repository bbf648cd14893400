"""What quantizes stays fp32, whatever precision the network around it is moved to, and so do its products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

Move = Callable[[Tensor], Tensor]


def keeping_dtype(move: Move) -> Move:
    """``move`` without its change of dtype: a scale rounded to bf16 is another scale."""

    def moved(tensor: Tensor) -> Tensor:
        found = move(tensor)
        return found if found.dtype == tensor.dtype else tensor.to(found.device)

    return moved


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, but for the microseconds that it takes where there is nothing to do."""
    return x if x.dtype is dtype else x.to(dtype)


class KeepsPrecision(nn.Module):
    """A module whose parameters and buffers change device but never dtype."""

    def _apply(self, fn: Move, recurse: bool = True) -> Any:
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 on CUDA: products of numbers cut to eleven bits are not those that an integer runtime adds up.

    Also a decorator. Convolutions would use TF32 unless told otherwise.
    """
    with ExitStack() as stack:
        _matmul_in_full(stack)
        _convolutions_in_full(stack)
        yield


# torch has an older way to say it (allow_tf32) and a newer one (fp32_precision), and refuses to read by the
# one what was set by the other. What is readable by the older is set by it, for others that read it so.


def _matmul_in_full(stack: ExitStack) -> None:
    try:
        kept = torch.get_float32_matmul_precision()
    except RuntimeError:
        _set(stack, torch.backends.cuda.matmul, "fp32_precision", "ieee")
        return
    stack.callback(torch.set_float32_matmul_precision, kept)
    torch.set_float32_matmul_precision("highest")


def _convolutions_in_full(stack: ExitStack) -> None:
    cudnn: Any = torch.backends.cudnn
    newer = [cudnn.conv, cudnn.rnn] if hasattr(cudnn, "conv") else []
    before = [(part, part.fp32_precision) for part in newer]
    with suppress(RuntimeError):  # where it was set by the newer way
        _set(stack, cudnn, "allow_tf32", False)
    for part, kept in before:
        if part.fp32_precision == "tf32":  # because everything is
            stack.callback(setattr, part, "fp32_precision", kept)
            part.fp32_precision = "ieee"


def _set(stack: ExitStack, where: Any, name: str, value: Any) -> None:
    stack.callback(setattr, where, name, getattr(where, name))
    setattr(where, name, value)

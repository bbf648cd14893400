"""What quantizes stays fp32, whatever precision the network around it is moved to, and so do its products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class KeepsPrecision(nn.Module):
    """A module whose parameters and buffers change device but never dtype."""

    def _apply(self, fn: Move, recurse: bool = True) -> Any:
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 on CUDA: products of numbers cut to eleven bits are not those that an integer runtime adds up.

    Also a decorator. Convolutions would use TF32 unless told otherwise.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    kept = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = kept

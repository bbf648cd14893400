"""What quantizes stays fp32, whatever precision the network around it is moved to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

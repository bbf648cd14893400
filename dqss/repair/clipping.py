"""The float network with inputs that are cut off where the quantized one's grids end, and not rounded.

Our own: targets of AdaRound (arXiv 2004.10568) and BRECQ (2102.05426) are the float network's. What a search
cuts off since the output does not need it, squared errors would bring back first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dqss.mixing import Grid


@contextmanager
def clipping(network: nn.Module, grids: Mapping[str, Grid]) -> Iterator[None]:
    """Meanwhile inputs of layers are clipped; hooks do it, and none is left afterwards.

    Args:
        network: the float one.
        grids: of the first argument of layers, by the layer's name: one scale and zero point, or one for each
            channel. What is no tensor of real numbers passes as it is.

    Raises:
        AttributeError: where the network has no layer of that name.
    """
    with ExitStack() as stack:
        for name, grid in grids.items():
            stack.callback(network.get_submodule(name).register_forward_pre_hook(_clip(grid)).remove)
        yield


def _clip(grid: Grid) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return args
        scale, zero_point = grid.shaped(x.shape)
        low, high = ((code - zero_point) * scale for code in (grid.spec.qmin, grid.spec.qmax))
        return (torch.clamp(x, low.to(x.dtype), high.to(x.dtype)), *rest)

    return hook

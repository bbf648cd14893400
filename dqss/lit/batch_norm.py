"""Statistics of batch norms for the network that is left after the argmax."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dqss.calls import call_model


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The modules with running statistics."""
    kinds = torch.nn.modules.batchnorm._BatchNorm
    return [m for m in model.modules() if isinstance(m, kinds) and m.track_running_stats]


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Any], run: Callable[[Any], Any] | None = None) -> int:
    """Replace running statistics by the mean of those of ``batches``; everything else is in ``eval()``.

    The running mean of a search has seen mixtures, whose variance is not that of the choice.

    Args:
        model: changed in place; left in ``eval()``.
        batches: inputs; none leaves the statistics as they were.
        run: runs ``model`` on one of them.

    Returns:
        How many norms were estimated anew.
    """
    norms = batch_norms(model)
    inputs = iter(batches) if norms else iter(())
    first = next(inputs, None)
    model.eval()
    if first is None:
        return 0
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().reset_running_stats()  # type: ignore[operator]
        norm.momentum = None  # a plain mean over all batches
    try:
        for batch in (first, *inputs):
            (run or (lambda given: call_model(model, given)))(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum
    return len(norms)

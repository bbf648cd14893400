"""Statistics of batch norms for the network that is left after the argmax."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dqss.calls import call_model


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The modules with running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Any]) -> int:
    """Replace running statistics by the mean of those of ``batches``; everything else is in ``eval()``.

    The running mean of a search has seen mixtures, whose variance is not that of the choice.

    Args:
        model: changed in place; left in ``eval()``.
        batches: inputs, as :func:`dqss.calls.call_model` takes them; none leaves the statistics as
            they were.

    Returns:
        How many norms were estimated anew.
    """
    model.eval()
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    inputs = list(batches) if norms else []
    if not inputs:
        return 0
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    try:
        for batch in inputs:
            call_model(model, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum
    return len(norms)

"""Adam for weights, quantizers and logits at once: quantizers in steps relative to their size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

RELATIVE = "relative"


class RelativeAdamW(torch.optim.AdamW):
    """AdamW whose groups with ``relative=True`` move each value by a share of itself.

    Adam's steps are of the size of the learning rate, whatever the gradient's. The steps and clips of
    quantizers differ from one another by orders of magnitude, from a weight's step of 0.01 to an
    activation's clip of 10: one rate fits all only as a share. Values near zero move as if they had a
    tenth of the mean size of their tensor. Our reading; the papers of the algorithms use SGD, each
    with rates of its own.
    """

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of AdamW."""
        relative = [p for group in self.param_groups if group.get(RELATIVE) for p in group["params"]]
        before = [p.detach().clone() for p in relative]
        loss = super().step(closure)
        with torch.no_grad():
            for parameter, old in zip(relative, before, strict=True):
                parameter.copy_(old + (parameter - old) * _size(old))
        return loss


def _size(values: Tensor) -> Tensor:
    magnitude = values.abs()
    return torch.maximum(magnitude, 0.1 * magnitude.mean())

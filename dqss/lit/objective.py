"""What QAT minimizes: the labels, the float network, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqss.calls import call_model
from dqss.losses import Distance, SearchLoss, TaskLoss


class Objective:
    """``(1 - distillation) * loss + distillation * distance``; only the distance where there are no labels.

    Args:
        teacher: the float network, in eval mode, on the device of the batches; it runs only where its
            output is needed.
        distance: to its output.
        loss: to the labels; None: cross-entropy for classes, L1 for pictures.
        distillation: weight in 0..1 of the distance.
    """

    def __init__(
        self,
        teacher: nn.Module,
        distance: Distance,
        loss: SearchLoss | None = None,
        distillation: float = 0.0,
    ) -> None:
        self.teacher, self.distance, self.loss, self.distillation = teacher, distance, loss, distillation

    def __call__(self, output: Any, inputs: Any, targets: Tensor | None) -> Tensor:
        """The mean over a batch."""
        loss = self.loss
        if loss is None and targets is not None:
            loss = TaskLoss(_task(targets), self.distance.read)
        weight = 1.0 if loss is None else self.distillation
        total = torch.zeros((), device=self.distance.read(output).device)
        reference = self._reference(inputs) if weight or not isinstance(loss, TaskLoss) else total
        if weight:
            total = total + weight * self.distance(output, reference)
        if loss is not None and weight < 1:
            total = total + (1 - weight) * loss(output, reference, targets)
        return total

    @torch.no_grad()
    def _reference(self, inputs: Any) -> Tensor:
        return self.distance.read(call_model(self.teacher, inputs)).detach()


def _task(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy for class indices, L1 for what is real."""
    return F.l1_loss if targets.is_floating_point() else _cross_entropy


def _cross_entropy(output: Tensor, targets: Tensor) -> Tensor:
    """In fp32, with classes on the last axis, as language models have them."""
    return F.cross_entropy(output.float().flatten(0, -2), targets.flatten())

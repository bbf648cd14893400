"""Task metrics by task, from torchmetrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchmetrics.classification import MulticlassAccuracy


def task_metric(task: str, num_classes: int | None) -> tuple[str, Callable[[], Any] | None]:
    """Name and factory of the metric of a task; no factory where there is none.

    ``classification``: ``top1``, the share of images whose largest logit is the target, in 0..1.
    """
    if task == "classification":
        return "top1", lambda: MulticlassAccuracy(num_classes=num_classes, average="micro")
    return "metric", None

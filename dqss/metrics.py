"""Task metrics by task, from torchmetrics, and how people read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchmetrics.classification import MulticlassAccuracy

PSNR = "psnr"
"""Name of the metric of networks that enlarge pictures, in dB."""


def task_metric(task: str, num_classes: int | None) -> tuple[str, Callable[[], Any] | None]:
    """Name and factory of the metric of a task; no factory where there is none.

    ``classification``: ``top1``, the share of images whose largest logit is the target, in 0..1.
    """
    if task == "classification":
        return "top1", lambda: MulticlassAccuracy(num_classes=num_classes, average="micro")
    return "metric", None


def as_read(name: str, value: float) -> str:
    """A task metric with its unit: decibels as they are, every other is a share."""
    return f"{name} {value:6.2f} dB" if name == PSNR else f"{name} {100 * value:6.2f} %"

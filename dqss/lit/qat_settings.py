"""Everything about a QAT search but model, data and search space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from dqss.checks import check_least, check_positive, check_share
from dqss.errors import UserError, near_match
from dqss.lit.optimizer import RelativeAdamW
from dqss.lit.schedules import Schedule, SoftmaxSchedule
from dqss.lit.updates import SinglePass, Update
from dqss.losses import Distance, SearchLoss

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class Start(Enum):
    """From which weights the network is tuned once its strategy is known."""

    SEARCHED = "searched"
    FLOAT = "float"


def _adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return RelativeAdamW(groups, betas=(0.9, 0.99))


def _pressed() -> Schedule:
    """A softmax that is pressed towards certainty; ``experiments/cifar_qat`` compares it with others."""
    return SoftmaxSchedule(entropy=0.5, entropy_delay=0.3)


@dataclass(frozen=True)
class QATSettings:
    """Settings of :func:`dqss.search_qat`; the method group of the configuration.

    The paper says that its optimization is adjusted against under-fitting, and we could not recover
    how: warm-up, all data for everything, compensation and tuning after the argmax are our readings.

    Attributes:
        epochs: passes over the training data of the search.
        warmup: share of them in which the logits stand still, at equal probabilities.
        tune_epochs: passes with the argmax alone, after the search; 0: none.
        start: weights, scales and clips that the tuning starts from.
        restart: rates fall to zero in the search, and once more in the tuning; otherwise they fall once
            over both. A tuning that starts from the float weights always begins anew.
        update: all from one loss in one pass, or in turn.
        compensate: undo the scaling of what scales and clips learn by their candidate's probability.
        batch_size: of all processes together.
        optimizer: makes one optimizer of three parameter groups that have their ``lr`` and
            ``weight_decay``: weights, quantizers (marked ``relative``), logits.
        learning_rate, quantizer_rate, logit_rate: of the three, at their highest.
        weight_decay: of the weights.
        ramp: share of the steps in which the rates rise; then they fall with a cosine.
        schedule: relaxation over the steps of the search.
        loss: to the labels; None: cross-entropy for classes, L1 for pictures, and where there are no
            labels the distance.
        distillation: weight in 0..1 of the distance to the float network, beside that loss.
        distance: to the float network; None: KL for logits, MSE for images.
        fold_batch_norm: train with folded batch norms (no statistics are left to learn or to keep
            apart); otherwise they stay, and are estimated anew after the argmax.
        norm_batches: training batches for that.
        max_minutes: limit on the wall clock; what has been reached then is exported.
        checkpoint_every: steps.
        record_every: steps between two rows of ``history.csv``.
    """

    epochs: float = 2.5
    warmup: float = 0.2
    tune_epochs: float = 7.5
    start: Start | str = Start.SEARCHED
    restart: bool = True
    update: Update = field(default_factory=SinglePass)
    compensate: bool = True
    batch_size: int = 128
    optimizer: MakeOptimizer = _adam
    learning_rate: float = 1e-3
    quantizer_rate: float = 1e-2
    logit_rate: float = 0.1
    weight_decay: float = 1e-4
    ramp: float = 0.05
    schedule: Schedule = field(default_factory=_pressed)
    loss: SearchLoss | None = None
    distillation: float = 0.0
    distance: Distance | None = None
    fold_batch_norm: bool = False
    norm_batches: int = 32
    max_minutes: float | None = None
    checkpoint_every: int = 50
    record_every: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", _start(self.start))
        always = ("epochs", "batch_size", "learning_rate", "checkpoint_every", "record_every")
        check_positive(self, "method", *always)
        check_positive(self, "method", "max_minutes", optional=True)
        rates = ("quantizer_rate", "logit_rate", "weight_decay")
        check_least(self, "method", 0, "tune_epochs", *rates, "norm_batches")
        check_share(self, "method", "warmup", "ramp", "distillation")


def _start(given: Start | str) -> Start:
    if isinstance(given, Start):
        return given
    known = [start.value for start in Start]
    if given not in known:
        raise UserError(f"method.start={given}{near_match(str(given), known)}: expected {' or '.join(known)}")
    return Start(given)

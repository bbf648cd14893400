"""QAT: weights, quantizer parameters and logits from one loss in one pass (arXiv 2404.08010)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dqss.calls import call_model
from dqss.decision import entropies, margins, outcome_probabilities
from dqss.errors import NonFiniteError
from dqss.lit.mean_field import MeanField
from dqss.lit.objective import Objective
from dqss.lit.optimizer import RELATIVE, WithMeanField
from dqss.lit.qat_settings import QATSettings
from dqss.lit.schedules import Schedule
from dqss.lit.stepped import HistoryRow, SteppedModule
from dqss.lit.training_data import Batch, Steps, TrainingData, seeded
from dqss.lit.trajectory import Trajectory
from dqss.lit.updates import Update
from dqss.trainable import TrainableSupernet

LOGITS = "logits"
OPEN = 0.999
"""Entropy of the decisions during the warm-up, as a share of ``log K``."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one schedule of its own.

    Attributes:
        name: of its checkpoint, and for people.
        batches: training batches in all.
        warmup: share of the steps in which the logits stand still.
        schedule: relaxation over the steps; None where every decision is fixed.
        update: what learns in which step.
        span: of the curve of learning rates, in shares; a phase may begin or end in the midst of it.
    """

    name: str
    batches: int
    warmup: float
    schedule: Schedule | None
    update: Update
    span: tuple[float, float] = (0.0, 1.0)


class QATTraining(SteppedModule):
    """One phase of QAT as any Lightning module: automatic optimization, one optimizer.

    Gradient clipping, accumulation, precision and strategies are those of the trainer. Everything
    random is a function of (seed, batch): a training that is resumed repeats none of it.

    Args:
        supernet: calibrated.
        phase: what is trained, and for how long.
        objective: loss of a batch.
        data: what is trained with.
        settings: rates and optimizer.
        seed: of batches, augmentation, noise and dropout.
        accumulate: batches to one step of the optimizer.

    Attributes:
        trajectory: of the logits; stays empty where every decision is fixed.
        effects: see :meth:`dqss.lit.mean_field.MeanField.learned`; empty without mean field.
    """

    def __init__(
        self,
        supernet: TrainableSupernet,
        phase: Phase,
        objective: Objective,
        data: TrainingData,
        settings: QATSettings,
        seed: int,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.supernet, self.phase, self.objective = supernet, phase, objective
        self.data, self.settings, self.seed, self.accumulate = data, settings, seed, accumulate
        self.position = 0
        """Batches done; those of an unfinished step of the optimizer are done again after a resume."""
        self._decisions = list(supernet.decisions.values())
        self._learnable = supernet.learnable()
        self.trajectory = Trajectory(self._decisions, self.steps)
        self.effects: dict[str, Tensor] = {}

    @property
    def steps(self) -> int:
        """See :attr:`SteppedModule.steps`."""
        return -(-self.phase.batches // self.accumulate)

    @property
    def between_steps(self) -> bool:
        """See :attr:`SteppedModule.between_steps`."""
        return self.position % self.accumulate == 0

    def batches(self) -> Steps:
        """The numbered batches of this process."""
        plans = self.phase.update.plans(len(self.data), self.settings.batch_size, self.seed)
        trainer = self._trainer
        rank, ranks = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        return Steps(self.data, plans, rank, ranks)

    def train_dataloader(self) -> DataLoader[Batch]:
        """The batches that are still to be done."""
        return self.batches().loader(self.position, self.steps * self.accumulate)

    # -- a step -------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One pass over a batch; the loss and what history keeps of it."""
        started, position = time.perf_counter(), self.position
        self._prepare(position)
        inputs, targets = batch
        with self.supernet.mode("relaxed"), seeded(self.seed, position, self.global_rank, [self.device]):
            output = call_model(self.supernet, inputs)
        loss = self.objective(output, inputs, targets)
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the training loss is {loss.item()} at step {self.global_step} of the {self.phase.name} "
                "phase; lower method.learning_rate, or clip gradients with +trainer.gradient_clip_val=1"
            )
        weight = 0.0 if self.phase.schedule is None else self.phase.schedule.entropy_weight(self.progress)
        with torch.set_grad_enabled(weight != 0):
            probabilities = outcome_probabilities(self._decisions)
            entropy = entropies(probabilities).mean()
        if position % (self.settings.record_every * self.accumulate) == 0:
            self._remember(loss, entropy, margins(probabilities), started)
        self.position += 1
        return loss + weight * entropy if weight else loss

    @property
    def progress(self) -> float:
        """How much of the phase is done, in 0..1; the warm-up does not count for the relaxation."""
        done = self.position / max(self.phase.batches - 1, 1)
        rest = max(1.0 - self.phase.warmup, 1e-9)
        return min(max((done - self.phase.warmup) / rest, 0.0), 1.0)

    def _prepare(self, position: int) -> None:
        if self.phase.schedule is None:
            return
        self.supernet.relax(self.phase.schedule.relaxation(self.progress))
        self.supernet.draw(self.seed, position)
        learnable = self._learnable
        moving = {id(p) for p in self.phase.update.learning(learnable, position)}
        for parameter in (*learnable.weights, *learnable.quantizers, *learnable.logits):
            parameter.requires_grad_(id(parameter) in moving)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A whole step, backward pass included; then keep scales and clips valid."""
        super().optimizer_step(*args, **kwargs)
        self.supernet.constrain()
        if self.phase.schedule is not None:
            self.trajectory.observe()

    def _remember(self, loss: Tensor, entropy: Tensor, margin: Tensor, started: float) -> None:
        row: HistoryRow = {
            "step": self.position,
            "soft_loss": loss.item(),
            "entropy": entropy.item(),
            "margin_mean": margin.mean().item(),
            "margin_min": margin.min().item(),
            "seconds": time.perf_counter() - started,
        }
        self.history.append(row)
        self.log_row(row)

    # -- optimizer ----------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """One optimizer, three parameter groups; rates rise, then fall with a cosine.

        Those of the logits fall to zero within the phase, the others along its span of the whole curve.
        """
        settings, learnable = self.settings, self._learnable
        groups: list[dict[str, Any]] = [
            {
                "name": "weights",
                "params": learnable.weights,
                "lr": settings.learning_rate,
                "weight_decay": settings.weight_decay,
            },
            {
                "name": "quantizers",
                "params": learnable.quantizers,
                "lr": settings.quantizer_rate,
                "weight_decay": 0.0,
                RELATIVE: True,
            },
            {"name": LOGITS, "params": learnable.logits, "lr": settings.logit_rate, "weight_decay": 0.0},
        ]
        mean_field = self._mean_field()
        kept = [group for group in groups if group["params"] and not (mean_field and group["name"] == LOGITS)]
        optimizer = settings.optimizer(kept)
        if mean_field is not None:
            optimizer = WithMeanField(optimizer, mean_field)
        rates = [self._rate(waits=group.get("name") == LOGITS) for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _mean_field(self) -> MeanField | None:
        """What sets the logits where that is how the schedule does it; at equal ones while it warms up."""
        if self.phase.schedule is None:
            return None
        waiting = round(self.phase.warmup * self.steps)
        made = self.phase.schedule.optimizer(self._decisions, max(self.steps - waiting, 1), 0.0)["optimizer"]
        if not isinstance(made, MeanField):
            return None
        wanted = made.entropy
        made.entropy = lambda done: wanted(done - waiting) if done > waiting else OPEN
        return made

    def _rate(self, waits: bool) -> Callable[[int], float]:
        steps = self.steps
        first = self.phase.warmup * steps if waits else 0.0
        begin, end = (0.0, 1.0) if waits else self.phase.span
        ramp = max(self.settings.ramp * steps, 1.0)

        def factor(step: int) -> float:
            if step < first:
                return 0.0
            rise = min(1.0, (step - first + 1) / ramp)
            along = begin + (end - begin) * min(step / steps, 1.0)
            return rise * 0.5 * (1.0 + math.cos(math.pi * along))

        return factor

    # -- checkpoints --------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Plain numbers beside the tensors, so that loading one runs nothing."""
        checkpoint["history"] = self.history
        checkpoint["batches"] = self.global_step * self.accumulate
        checkpoint["trajectory"] = self.trajectory.state_dict()
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.effects = optimizer.mean_field.learned() if isinstance(optimizer, WithMeanField) else {}
        checkpoint["effects"] = self.effects

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Undo :meth:`on_save_checkpoint`."""
        self.history = list(checkpoint["history"])
        self.position = int(checkpoint["batches"])
        self.trajectory.load_state_dict(checkpoint["trajectory"])
        self.effects = dict(checkpoint["effects"])

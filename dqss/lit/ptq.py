"""PTQ search: the network is frozen, only the architecture logits learn (arXiv 2404.08010)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dqss.budget.limits import Limits
from dqss.budget.steer import Steering
from dqss.calls import call_model
from dqss.decision import entropies, margins, outcome_probabilities
from dqss.errors import NonFiniteError
from dqss.lit.mean_field import MeanField, begin_informed
from dqss.lit.schedules import Schedule
from dqss.lit.settling import Settled, Settling
from dqss.lit.stepped import HistoryRow, SteppedModule
from dqss.lit.training_data import StepPlan
from dqss.lit.trajectory import Trajectory
from dqss.lit.unchanged import Unchanged
from dqss.losses import SearchLoss
from dqss.measure import Evaluator, to_device
from dqss.sensitivity import Estimates

NEVER = Settling()
"""Nothing is frozen."""


class StepBatches(IterableDataset[list[int]]):
    """Batches of sample indices as a pure function of (seed, step), from any step on.

    Each epoch is its own permutation; a resumed search sees exactly the batches that the
    undisturbed one would have seen. Several processes share each batch.
    """

    def __init__(
        self,
        part: Sequence[int],
        batch_size: int,
        steps: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.plan = StepPlan(list(part), batch_size, seed)
        self.steps, self.seed, self.start = steps, seed, start
        self.rank, self.ranks = rank, ranks

    @property
    def batch_size(self) -> int:
        """Samples in a batch, of all processes together."""
        return self.plan.size

    def at(self, step: int) -> list[int]:
        """Indices of one step, for this process."""
        return self.plan.at(step)[self.rank :: self.ranks]

    def __iter__(self) -> Iterator[list[int]]:
        """The remaining steps."""
        return (self.at(step) for step in range(self.start, self.steps))


class PTQSearch(SteppedModule):
    """Gradients of the logits, with a label-free loss to the float network's outputs.

    Args:
        evaluator: holds the calibrated supernet, the samples and the float references.
        batches: which samples each step sees.
        schedule: relaxation, entropy weight and optimizer.
        loss: what is minimized, beside the entropy.
        learning_rate: of schedules that have one.
        discrete_every: steps between two measurements of the discrete network (0: none).
        discrete_images: images for that.
        settle: when decisions are frozen to their choice.
        stop_after: the search is done when its argmax has not changed in so many steps (None: never
            before its last), see :class:`dqss.lit.unchanged.Unchanged`.
        limits: of a budget, which steer the search and which every assignment found keeps.
        estimates: of the effect of each option, for a search with limits to begin from.
        shown: effects of options to begin with, see :func:`dqss.uniform.shown_effects`; None: nothing
            is known of any.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        batches: StepBatches,
        schedule: Schedule,
        loss: SearchLoss,
        learning_rate: float,
        discrete_every: int = 0,
        discrete_images: int = 32,
        settle: Settling = NEVER,
        stop_after: int | None = None,
        limits: Limits | None = None,
        estimates: Estimates | None = None,
        shown: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.supernet = evaluator.supernet
        self.evaluator = evaluator
        self.batches = batches
        self.schedule = schedule
        self.loss = loss
        self.learning_rate = learning_rate
        self.discrete_every, self.discrete_images = discrete_every, discrete_images
        self._decisions = list(self.supernet.decisions.values())
        self.shown = shown
        self.settled = Settled(self._decisions, settle)
        self.unchanged = Unchanged(self._decisions, stop_after)
        self.trajectory = Trajectory(self._decisions, batches.steps)
        self.effects: dict[str, Tensor] = {}
        """What was learned of each decision's options, see :meth:`MeanField.learned`; from checkpoints."""
        self.steering = None if limits is None else Steering(self._decisions, limits, estimates)
        entropy = schedule.informed_entropy
        if self.steering is not None and estimates is not None and entropy is not None:
            begin_informed(self.steering, entropy)
        self.found: list[dict[str, int]] = []
        """What is chosen after each fall of the entropy, see :meth:`Schedule.cold`."""
        self.seconds = 0.0
        self.strict_loading = False

    def train(self, mode: bool = True) -> PTQSearch:
        """The network never leaves ``eval()``: dropout and batch norms are those of inference."""
        return super().train(False)

    def configure_optimizers(self) -> Any:
        """What the schedule moves the logits with."""
        steps = self.batches.steps
        known = [decision.logits.detach().clone() for decision in self._decisions]
        found = self.schedule.optimizer(self._decisions, steps, self.learning_rate, self.steering, self.shown)
        if self.batches.start > 0:  # a search that goes on has its logits from the checkpoint
            with torch.no_grad():
                for decision, logits in zip(self._decisions, known, strict=True):
                    decision.logits.copy_(logits)
        return found

    def choose(self) -> dict[str, int]:
        """The argmax, or with a budget the best assignment within it."""
        return self.supernet.argmax() if self.steering is None else self.steering.choose()

    def train_dataloader(self) -> DataLoader[list[int]]:
        """One element a step."""
        return DataLoader(self.batches, batch_size=None)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Indices stay where they are."""
        return batch

    def training_step(self, indices: list[int], batch_idx: int) -> Tensor:
        """One forward pass of the mixture; the loss and what history keeps of it."""
        started, step = time.perf_counter(), self.global_step
        if step in self.schedule.cold(self.batches.steps):
            self.found.append(self.choose())
        progress = step / max(self.batches.steps - 1, 1)
        self._relax(progress, step)
        inputs = to_device(self.evaluator.samples.batch(indices), self.device)
        targets = self.evaluator.samples.targets(indices)
        with self.supernet.mode("relaxed"):
            output = call_model(self.supernet, inputs)
        loss = self.loss(
            output,
            self.evaluator.reference(indices),
            None if targets is None else targets.to(self.device),
        )
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"search loss is {loss.item()} at step {step}; with Adam, lower method.learning_rate"
            )
        self.evaluator.meter.backward(len(indices) * self.batches.ranks)
        weight = self.schedule.entropy_weight(progress)
        with torch.set_grad_enabled(weight != 0):
            probabilities = outcome_probabilities(self._decisions)
            entropy = entropies(probabilities).mean()
        self._remember(step, loss, entropy, margins(probabilities), started)
        total = loss + weight * entropy if weight else loss
        if self.steering is not None and not self.schedule.prices_effects:
            total = total + self.steering.penalty(loss)
        return total

    def _relax(self, progress: float, step: int) -> None:
        self.supernet.relax(self.schedule.relaxation(progress))
        self.settled.freeze()
        self.supernet.draw(self.batches.seed, step)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A whole step, backward pass included; then look at where the logits have come."""
        super().optimizer_step(*args, **kwargs)
        self.settled.observe()
        self.unchanged.observe()
        self.trajectory.observe()
        if self.finished:
            self.trainer.should_stop = True

    @property
    def steps(self) -> int:
        """See :attr:`SteppedModule.steps`."""
        return self.batches.steps

    @property
    def finished(self) -> bool:
        """Whether further steps would change nothing, as far as one may tell."""
        return self.unchanged.done or len(self.settled.frozen) == len(self._decisions)

    def _remember(self, step: int, loss: Tensor, entropy: Tensor, margin: Tensor, started: float) -> None:
        row: HistoryRow = {
            "step": step,
            "soft_loss": loss.item(),
            "entropy": entropy.item(),
            "margin_mean": margin.mean().item(),
            "margin_min": margin.min().item(),
        }
        if self.discrete_every and (step % self.discrete_every == 0 or step == self.batches.steps - 1):
            row["discrete_distance"] = self.evaluator.measure(self.choose(), "refine", self.discrete_images)
        if self.settled.settling.margin is not None:
            row["frozen"] = len(self.settled.frozen)
        row["seconds"] = time.perf_counter() - started
        self.history.append(row)
        self.log_row(row)

    def settle(self) -> None:
        """Relax as the last step does, and note the last choice, however the search came to its end."""
        self.found.append(self.choose())
        self.trajectory.keep()
        self._relax(1.0, self.batches.steps - 1)

    # -- checkpoints: logits, optimizer and history, never the network --------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what learns; everything else is a function of model, inputs and seed."""
        checkpoint["state_dict"] = {
            f"logits.{name}": decision.logits.detach().clone()
            for name, decision in self.supernet.decisions.items()
        }
        checkpoint["history"] = self.history
        checkpoint["found"] = self.found
        checkpoint["settled"] = self.settled.state_dict()
        checkpoint["unchanged"] = self.unchanged.state_dict()
        checkpoint["trajectory"] = self.trajectory.state_dict()
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.effects = optimizer.learned() if isinstance(optimizer, MeanField) else {}
        checkpoint["effects"] = self.effects
        if self.steering is not None:
            checkpoint["steering"] = self.steering.state_dict()
        checkpoint["evaluations"] = self.evaluator.meter.evaluations

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Undo :meth:`on_save_checkpoint`."""
        with torch.no_grad():
            for name, decision in self.supernet.decisions.items():
                decision.logits.copy_(checkpoint["state_dict"][f"logits.{name}"])
        checkpoint["state_dict"] = {}
        self.history, self.found = list(checkpoint["history"]), list(checkpoint["found"])
        self.settled.load_state_dict(checkpoint["settled"])
        self.unchanged.load_state_dict(checkpoint["unchanged"])
        self.trajectory.load_state_dict(checkpoint["trajectory"])
        self.effects = dict(checkpoint["effects"])
        if self.steering is not None:
            self.steering.load_state_dict(checkpoint["steering"])
        self.evaluator.meter.evaluations = int(checkpoint["evaluations"])

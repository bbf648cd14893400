"""Training of networks that enlarge pictures: L1, restarts from the last weights, an averaged network."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from dqss.contrastive import ContrastiveLoss
from dqss.data.bicubic import resize
from dqss.data.super_resolution import SuperResolutionData
from dqss.errors import NonFiniteError
from dqss.image_quality import PsnrY
from dqss.lit.stages import Stages
from dqss.lit.stepped import HistoryRow, SteppedModule
from dqss.lit.training_data import Batch, StepPlan, Steps, TrainingData
from dqss.models.blocks import SuperResolver


class SuperResolutionTraining(SteppedModule):
    """Stages of L1 training with Adam; each starts from the averaged weights of the last.

    Patches are a function of (seed, step), and all else that lasts is in the checkpoint: a training
    that is resumed ends as one that was not interrupted.

    Args:
        network: what is trained, in place.
        data: patches to train on, and pictures to measure on.
        stages: how long, how fast, with which loss.
        batch_size: patches a step.
        decay: of the averaged weights, a step; 0: the weights themselves.
        measure_every: steps between two rows of the history.
        seed: of the patches.

    Attributes:
        average: the network with the averaged weights, which is what comes of the training.
    """

    def __init__(
        self,
        network: SuperResolver,
        data: SuperResolutionData,
        stages: Stages,
        batch_size: int,
        decay: float,
        measure_every: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.network, self.average = network, copy.deepcopy(network).eval().requires_grad_(False)
        self.data, self.stages, self.batch_size = data, stages, batch_size
        self.decay, self.measure_every, self.seed = decay, measure_every, seed
        self.contrast = ContrastiveLoss(network.peak)
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.total: Tensor
        """Of the losses since the last row."""

    @property
    def steps(self) -> int:
        """See :attr:`SteppedModule.steps`."""
        return self.stages.total

    def train_dataloader(self) -> DataLoader[Batch]:
        """The batches that are still to be done."""
        count = self.steps * self.batch_size
        plan = StepPlan(range(count), self.batch_size, self.seed)
        patches = TrainingData(self.data.patches(count))
        return Steps(patches, [plan]).loader(self.global_step, self.steps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """L1 to the picture, and the stage's share of the contrastive loss."""
        low, high = batch
        assert high is not None
        output = self.network(low)
        loss = F.l1_loss(output, high)
        weight = self.stages.contrastive_at(self.global_step)
        if weight:
            # Relative to L1's own unit, so that a weight means the same for networks of any range.
            negative = resize(low, *high.shape[2:])
            loss = loss + weight * self.network.peak * self.contrast(output, high, negative)
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"the training loss is {loss.item()} at step {self.global_step}: lower recipe.learning_rate"
            )
        self.total += loss.detach().double()
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """A new stage starts from the averaged weights, and its optimizer from nothing."""
        if self.global_step in self.stages.starts[1:]:
            self.network.load_state_dict(self.average.state_dict())
            self._adam().state.clear()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A whole step; then the averaged weights follow, and now and then are measured."""
        super().optimizer_step(*args, **kwargs)
        done = self.global_step + 1  # Lightning counts it after this
        with torch.no_grad():
            # Early on an average over many steps would be one of random weights.
            share = 1.0 - min(self.decay, done / (done + 10.0))
            for kept, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                kept.lerp_(new, share)
        if done % self.measure_every == 0 or done == self.steps:
            self._remember(done)

    def _remember(self, done: int) -> None:
        since = done % self.measure_every or self.measure_every
        row: HistoryRow = {
            "step": done,
            "stage": self.stages.number_at(done - 1) + 1,
            "learning_rate": self.stages.rate_at(done - 1),
            "loss": float(self.total) / since,
        }
        quality = measure(self.average, self.data)
        if quality is not None:
            row["psnr"] = quality
        self.total.zero_()
        self.history.append(row)
        self.log_row(row)

    def configure_optimizers(self) -> Any:
        """Adam, whose rate falls to zero with a cosine in each stage."""
        adam = torch.optim.Adam(self.network.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, self.stages.rate_at)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _adam(self) -> torch.optim.Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Plain numbers beside the tensors, so that loading one runs nothing."""
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Undo :meth:`on_save_checkpoint`."""
        self.history = list(checkpoint["history"])


@torch.no_grad()
def measure(network: SuperResolver, data: SuperResolutionData) -> float | None:
    """PSNR on luma of the pictures to measure on, in dB; None where there are none.

    Raises:
        DataError: for pictures that are smaller than the network takes.
    """
    meter, loader = PsnrY(data.peak, data.scale), data.val_dataloader()
    if loader is None:
        return None
    device = next(network.parameters()).device
    for low, high in loader:
        meter.update(network(low.to(device)).cpu(), high)
    return float(meter.compute())


def measure_bicubic(data: SuperResolutionData) -> float | None:
    """The same of bicubic interpolation, which a network should beat."""
    meter, loader = PsnrY(data.peak, data.scale), data.val_dataloader()
    if loader is None:
        return None
    for low, high in loader:
        meter.update(resize(low, *high.shape[2:]), high)
    value = float(meter.compute())
    return None if math.isnan(value) else value

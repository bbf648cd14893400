"""What each of several processes does; run by ``torchrun``, or alone. Results go to a file for each.

python -m tests.support.processes FOLDER qat|ptq
"""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn

from dqss.fused import fused
from dqss.lit.ranks import rank
from dqss.lit.schedules import MeanFieldSchedule
from dqss.lit.search import search_ptq
from dqss.lit.settings import PTQSettings
from tests.support.nets import cnn, small_space
from tests.support.training import CPU, pairs, tiny_search


class Watch(pl.Callback):
    """Gradients of the first step, and the logits after each."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.logits: list[torch.Tensor] = []

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.gradients:
            named = pl_module.named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object) -> None:
        logits = [p.detach().flatten() for name, p in pl_module.named_parameters() if name.endswith("logits")]
        self.logits.append(torch.cat(logits).clone())


def network() -> nn.Module:
    """The same in every process."""
    torch.manual_seed(0)
    return cnn()


def qat(folder: Path) -> None:
    """A QAT search with folded batch norms."""
    watch = Watch()
    import tests.support.training as training

    training.CPU = {**CPU, "callbacks": [watch]}
    result = tiny_search(network(), run_dir=folder / "run", changes={"fold_batch_norm": True, "epochs": 1})
    torch.save(
        {"gradients": watch.gradients, "logits": torch.stack(watch.logits), "tensors": result.bundle.tensors},
        folder / f"{rank()}.pt",
    )


def ptq(folder: Path) -> None:
    """A PTQ search between two bits and eight, of which it is clear which is better."""
    space = small_space([2, 8], ("minmax",))
    settings = PTQSettings(steps=40, schedule=MeanFieldSchedule(reheats=0), discrete_every=0)
    inputs, _ = pairs()
    result = search_ptq(network(), inputs, space, settings, run_dir=folder / "run", trainer=CPU)
    choices = {
        f"{layer}.{role}": (choice.bits, choice.margin)
        for layer, role, choice in result.bundle.strategy.choices()
    }
    torch.save({"choices": choices}, folder / f"{rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with fused(False):
        {"qat": qat, "ptq": ptq}[sys.argv[2]](Path(sys.argv[1]))

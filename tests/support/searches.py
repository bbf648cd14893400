"""A search of a few steps on a tiny network, and Lightning around it."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from dqss.discretize import RefineSettings
from dqss.lit.ptq import PTQSearch, StepBatches
from dqss.lit.schedules import Schedule
from dqss.lit.search import SearchResult, search_ptq
from dqss.lit.settings import PTQSettings
from dqss.space import SearchSpace
from tests.support.nets import calibrated, cnn, evaluator_of, images, small_space

PARTS = {"search": [11, 2, 7, 4, 9, 0, 5, 1], "refine": [3, 6], "select": [8, 10]}


def search(
    schedule: Schedule,
    steps: int = 1,
    model: nn.Module | None = None,
    space: SearchSpace | None = None,
    **options: Any,
) -> PTQSearch:
    """Always the same network and inputs; ``options`` are those of :class:`PTQSearch`."""
    torch.manual_seed(4)
    inputs = images(12)
    supernet = calibrated(model or cnn(), inputs, space=space)
    evaluator = evaluator_of(supernet, inputs, PARTS)
    plan = StepBatches(PARTS["search"], 4, steps, seed=7)
    return PTQSearch(evaluator, plan, schedule, evaluator.distance, **{"learning_rate": 0.1, **options})


def fit(module: PTQSearch, *callbacks: pl.Callback) -> PTQSearch:
    """Run all its steps."""
    trainer = pl.Trainer(
        max_steps=module.batches.steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module)
    return module


class Recorder(pl.Callback):
    """All logits after each step."""

    def __init__(self) -> None:
        self.logits: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        assert isinstance(pl_module, PTQSearch)
        decisions = pl_module.supernet.decisions
        self.logits.append({name: d.logits.detach().clone() for name, d in decisions.items()})


QUICK = PTQSettings(
    steps=6, batch_size=8, refine=RefineSettings(passes=6), discrete_every=3, discrete_images=4
)
"""Some steps of everything."""


def quick(seed: int = 0, space: SearchSpace | None = None, **options: Any) -> tuple[SearchResult, Tensor]:
    """A whole search on a small network, and its 32 inputs."""
    torch.manual_seed(100)
    model, inputs = cnn(), images(32)
    settings = options.pop("settings", QUICK)
    return search_ptq(model, inputs, space or small_space(2), settings, seed=seed, **options), inputs

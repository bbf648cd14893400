"""The steps of a search, run by Lightning: started, resumed, stopped in time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from dqss.budget.limits import Limits
from dqss.descent import WATCHED
from dqss.errors import UserError
from dqss.lit.checkpoint import AtomicCheckpoints, Deadline, SafeKeeping, restore, resumable_step
from dqss.lit.device import device_of
from dqss.lit.ptq import PTQSearch, StepBatches
from dqss.lit.quiet import quiet_lightning
from dqss.lit.ranks import check_processes, rank, world_size
from dqss.lit.settings import PTQSettings
from dqss.measure import Evaluator
from dqss.progress import Reporter
from dqss.spec import Candidate
from dqss.supernet import Supernet
from dqss.uniform import widest

SEARCH_SHARE = 0.6
"""Share of ``max_minutes`` at which the search stops."""


def fit_ptq(
    evaluator: Evaluator,
    settings: PTQSettings,
    seed: int,
    folder: Path | None,
    deadline: Deadline,
    reporter: Reporter,
    trainer: Mapping[str, Any],
    logger: Logger | bool,
    limits: Limits | None = None,
    shown: Mapping[str, Tensor] | None = None,
) -> PTQSearch:
    """Run all steps that are still to be done, and settle the supernet as the last one leaves it.

    ``shown`` is what the search begins with, see :class:`PTQSearch`.
    """
    steps = planned_steps(settings, evaluator.supernet)
    checkpoint, start = resumable_step(folder, list(evaluator.supernet.decisions))
    if world_size() > evaluator.batch_size:
        raise UserError(
            f"method.batch_size={evaluator.batch_size}: {world_size()} processes need at least one image each"
        )
    plan = StepBatches(
        evaluator.parts["search"], evaluator.batch_size, steps, seed, start, rank(), world_size()
    )
    estimates = None
    if limits is not None:
        estimates = evaluator.second_order(widest(evaluator.supernet), "search", WATCHED)
    module = PTQSearch(
        evaluator,
        plan,
        settings.schedule,
        settings.loss or evaluator.distance,
        settings.learning_rate,
        settings.discrete_every,
        settings.discrete_images,
        settings.settle,
        settings.stop_after,
        limits,
        estimates,
        shown,
    )
    restore(module, checkpoint)
    with reporter.stage("search", steps) as stage:
        stage.advance(start)
        keeping = SafeKeeping(folder, settings.checkpoint_every, deadline, SEARCH_SHARE, reporter, stage)
        with quiet_lightning():
            runner = _runner(steps, keeping, logger, trainer)
            try:
                if start < steps and not module.finished:
                    runner.fit(module, ckpt_path=checkpoint)
            except SIGTERMException:
                # Lightning saw the signal before the reporter was asked; the answer is the same.
                reporter.check()
                raise
    module.settle()
    return module


def settled(settings: PTQSettings, supernet: Supernet) -> PTQSettings:
    """The settings with nothing left open, for a search of this supernet."""
    return settings.at(fewest_bits(supernet))


def planned_steps(settings: PTQSettings, supernet: Supernet) -> int:
    """How many steps a search of this supernet takes."""
    return settings.steps_at(fewest_bits(supernet))


def fewest_bits(supernet: Supernet) -> int:
    """The least bits of any candidate."""
    options = [option for decision in supernet.decisions.values() for option in decision.options]
    return min(option.spec.bits for option in options if isinstance(option, Candidate))


def _runner(
    steps: int, keeping: SafeKeeping, logger: Logger | bool, trainer: Mapping[str, Any]
) -> pl.Trainer:
    accelerator = "gpu" if device_of(trainer).type == "cuda" else "cpu"
    options: dict[str, Any] = {**trainer, **check_processes(trainer), "accelerator": accelerator}
    try:
        return pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            callbacks=[keeping],
            plugins=[AtomicCheckpoints()],
            logger=logger,
            log_every_n_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            **options,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error

"""The steps of a search, run by Lightning: started, resumed, stopped in time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from torch import Tensor

from dqss.budget.limits import Limits
from dqss.descent import WATCHED
from dqss.errors import UserError
from dqss.lit.checkpoint import Deadline, SafeKeeping, restore, resumable_step
from dqss.lit.ptq import PTQSearch, StepBatches
from dqss.lit.ranks import rank, world_size
from dqss.lit.running import run_steps
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
    settings = settled(settings, evaluator.supernet)
    steps, size = planned_steps(settings, evaluator.supernet), images_a_step(settings, evaluator)
    checkpoint, start = resumable_step(folder, list(evaluator.supernet.decisions))
    if world_size() > size:
        raise UserError(f"method.batch_size={size}: {world_size()} processes need at least one image each")
    plan = StepBatches(evaluator.parts["search"], size, steps, seed, start, rank(), world_size())
    estimates = None
    if limits is not None and checkpoint is None:  # a checkpoint has them
        # One input a pass: by this all decisions are chosen at once, and of more squares the mean is finer.
        estimates = evaluator.second_order(widest(evaluator.supernet), "search", WATCHED, group=1, alone=True)
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
        run_steps(module, keeping, reporter, trainer, logger, checkpoint, start)
    module.settle()
    return module


def images_a_step(settings: PTQSettings, evaluator: Evaluator) -> int:
    """Of a search with settings in which nothing is open; one where the inputs differ in shape."""
    assert settings.batch_size is not None
    return settings.batch_size if evaluator.samples.uniform else 1


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

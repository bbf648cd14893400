"""A module that is trained step by step, run by Lightning: started, resumed, stopped in time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import SIGTERMException

from dqss.errors import StrategyError, UserError
from dqss.lit.checkpoint import AtomicCheckpoints, SafeKeeping
from dqss.lit.device import device_of
from dqss.lit.quiet import quiet_lightning
from dqss.lit.ranks import check_processes
from dqss.lit.stepped import SteppedModule
from dqss.progress import Reporter

CHECKPOINTS = Path("checkpoints")
"""Below a run folder."""


def run_steps(
    module: SteppedModule,
    keeping: SafeKeeping,
    reporter: Reporter,
    trainer: Mapping[str, Any],
    logger: Logger | bool,
    checkpoint: Path | None,
    start: int,
) -> None:
    """Run the steps from ``start`` on.

    Args:
        module: in the state of ``checkpoint``, if there is one.
        keeping: saves, and stops in time.
        reporter: has the wish to stop.
        trainer: arguments of :class:`pytorch_lightning.Trainer`.
        logger: of Lightning.
        checkpoint: from which Lightning goes on.
        start: steps that are done.
    """
    with quiet_lightning():
        runner = make_trainer(module, keeping, logger, trainer)
        try:
            if start < module.steps and not module.finished:
                runner.fit(module, ckpt_path=checkpoint)
        except SIGTERMException:
            # Lightning saw the signal before the reporter was asked; the answer is the same.
            reporter.check()
            raise


def restored(module: SteppedModule, folder: Path | None, file: Path) -> tuple[Path | None, int]:
    """Put the state of an interrupted run back; its checkpoint and step, or ``(None, 0)``.

    Raises:
        StrategyError: for a checkpoint that is damaged or of something else.
    """
    path = None if folder is None else folder / file
    if path is None or not path.exists():
        return None, 0
    try:
        checkpoint = AtomicCheckpoints().load_checkpoint(path)
        step = int(checkpoint["global_step"])
        module.load_state_dict(checkpoint["state_dict"])
        module.on_load_checkpoint(checkpoint)
    except Exception as error:
        raise StrategyError(
            f"{path}: not a checkpoint of this search ({type(error).__name__}); remove it to start this "
            "phase again"
        ) from error
    return path, step


def make_trainer(
    module: SteppedModule, keeping: SafeKeeping, logger: Logger | bool, trainer: Mapping[str, Any]
) -> pl.Trainer:
    """Lightning's trainer for one phase; what its user says goes before what we say."""
    given = dict(trainer)
    # Last: what it keeps is what the others have made of a step.
    callbacks = [*map(_fresh, given.pop("callbacks", None) or ()), keeping]
    accelerator = "gpu" if device_of(trainer).type == "cuda" else "cpu"
    options: dict[str, Any] = {**given, **check_processes(trainer), "accelerator": accelerator}
    try:
        return pl.Trainer(
            max_steps=module.steps,
            max_epochs=-1,
            callbacks=callbacks,
            plugins=[AtomicCheckpoints()],
            logger=logger,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **options,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def _fresh(callback: Callback) -> Callback:
    """Averages of weights begin anew in each phase: theirs are other networks, and steps count from zero."""
    return copy.deepcopy(callback) if isinstance(callback, WeightAveraging) else callback

"""One phase of QAT, run by Lightning: started, resumed, stopped in time."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import SIGTERMException

from dqss.errors import StrategyError, UserError
from dqss.lit.checkpoint import AtomicCheckpoints, Deadline, SafeKeeping
from dqss.lit.device import device_of
from dqss.lit.qat import QATTraining
from dqss.lit.quiet import quiet_lightning
from dqss.lit.ranks import check_processes
from dqss.lit.stepped import HistoryRow
from dqss.progress import Reporter

CHECKPOINTS = Path("checkpoints")


def fit_qat(
    module: QATTraining,
    folder: Path | None,
    deadline: Deadline,
    share: float,
    reporter: Reporter,
    trainer: Mapping[str, Any],
    logger: Logger | bool,
    earlier: Sequence[HistoryRow] = (),
) -> None:
    """Run the steps of ``module.phase`` that are still to be done; it ends as the last one leaves it.

    Args:
        module: one phase.
        folder: the run folder, or None to keep nothing.
        deadline, share: the phase stops when this share of the time is used.
        reporter: progress and the wish to stop.
        trainer: arguments of :class:`pytorch_lightning.Trainer`.
        logger: of Lightning.
        earlier: history of earlier phases.

    Raises:
        StrategyError: if the checkpoint is damaged or of another search.
    """
    file = CHECKPOINTS / f"{module.phase.name}.ckpt"
    checkpoint, start = _restored(module, folder, file)
    with reporter.stage(module.phase.name, module.steps) as stage:
        stage.advance(start)
        every = module.settings.checkpoint_every
        keeping = SafeKeeping(folder, every, deadline, share, reporter, stage, file, earlier)
        with quiet_lightning():
            runner = make_trainer(module, keeping, logger, trainer)
            try:
                if start < module.steps:
                    runner.fit(module, ckpt_path=checkpoint)
            except SIGTERMException:
                # Lightning saw the signal before the reporter was asked; the answer is the same.
                reporter.check()
                raise
    module.supernet.to(device_of(trainer))


def _restored(module: QATTraining, folder: Path | None, file: Path) -> tuple[Path | None, int]:
    """Put the state of an interrupted phase back; its checkpoint and step, or ``(None, 0)``."""
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
    module: QATTraining, keeping: SafeKeeping, logger: Logger | bool, trainer: Mapping[str, Any]
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

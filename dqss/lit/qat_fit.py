"""One phase of QAT: started, resumed, stopped in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from dqss.lit.checkpoint import Deadline, SafeKeeping
from dqss.lit.device import device_of
from dqss.lit.qat import QATTraining
from dqss.lit.running import CHECKPOINTS, restored, run_steps
from dqss.lit.stepped import HistoryRow
from dqss.progress import Reporter


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
    checkpoint, start = restored(module, folder, file)
    with reporter.stage(module.phase.name, module.steps) as stage:
        stage.advance(start)
        every = module.settings.checkpoint_every
        keeping = SafeKeeping(folder, every, deadline, share, reporter, stage, file, earlier)
        run_steps(module, keeping, reporter, trainer, logger, checkpoint, start)
    module.supernet.to(device_of(trainer))

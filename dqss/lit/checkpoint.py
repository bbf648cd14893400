"""Keeping a search safe while it runs: atomic checkpoints, time limit, orderly stop."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException

from dqss.errors import StrategyError
from dqss.io import ensure_folder, write_bytes_atomic, write_text_atomic
from dqss.lit.ptq import PTQSearch
from dqss.lit.stepped import HistoryRow, SteppedModule
from dqss.progress import Interrupted, Reporter, Stage

LAST = Path("checkpoints") / "last.ckpt"


class Deadline:
    """A limit on the wall clock; ``None`` minutes never pass."""

    def __init__(self, minutes: float | None) -> None:
        self._started = time.monotonic()
        self._seconds = None if minutes is None else 60.0 * minutes

    @property
    def limited(self) -> bool:
        """Whether there is a limit at all."""
        return self._seconds is not None

    def passed(self, share: float = 1.0) -> bool:
        """Whether ``share`` of the time is used up."""
        return self._seconds is not None and time.monotonic() - self._started >= share * self._seconds


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints are whole or not there, and nothing in them is ever run."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Replace the file at ``path``, or leave the old one whole."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        ensure_folder(Path(path).parent)
        write_bytes_atomic(path, buffer.getvalue())

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Tensors and plain containers only, whatever the caller asks for."""
        loaded: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        return loaded


class SafeKeeping(Callback):
    """Saves every ``every`` steps, stops at the deadline, saves and stops when asked to.

    Args:
        folder: the run folder, or None to keep nothing.
        every: steps between two checkpoints.
        deadline, share: the search stops when this share of the time is used.
        reporter, stage: progress and the wish to stop.
        file: the checkpoint, below ``folder``.
        earlier: rows of the history from before these steps.
    """

    def __init__(
        self,
        folder: Path | None,
        every: int,
        deadline: Deadline,
        share: float,
        reporter: Reporter,
        stage: Stage,
        file: Path = LAST,
        earlier: Sequence[HistoryRow] = (),
    ) -> None:
        self.folder, self.every, self.file, self.earlier = folder, every, file, list(earlier)
        self.deadline, self.share = deadline, share
        self.reporter, self.stage = reporter, stage

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed search gives its log the rows from before the interruption."""
        assert isinstance(pl_module, SteppedModule)
        for row in pl_module.history:
            pl_module.log_row(row)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """After each step of the optimizer."""
        assert isinstance(pl_module, SteppedModule)
        if not pl_module.between_steps:
            return
        try:
            self.stage.advance()
        except Interrupted:
            self._save(trainer, pl_module)
            raise
        if trainer.global_step % self.every == 0:
            self._save(trainer, pl_module)
        if pl_module.finished and trainer.global_step < pl_module.steps:
            self.reporter.say(f"nothing changes any more: search stops after {trainer.global_step} steps")
        elif self._out_of_time(trainer) and trainer.global_step < pl_module.steps:
            self.reporter.say(f"time limit: search stops after {trainer.global_step} steps")
            trainer.should_stop = True

    def _out_of_time(self, trainer: pl.Trainer) -> bool:
        """Whether any process thinks so: they must stop together."""
        passed = self.deadline.passed(self.share)
        if trainer.world_size == 1 or not self.deadline.limited:
            return passed
        return trainer.strategy.reduce_boolean_decision(passed, all=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The final state, from which discretizing can start again."""
        assert isinstance(pl_module, SteppedModule)
        self._save(trainer, pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Lightning has a stop of its own, between two steps, that comes by no other hook."""
        assert isinstance(pl_module, SteppedModule)
        if isinstance(exception, SIGTERMException) and pl_module.between_steps:
            self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, module: SteppedModule) -> None:
        if self.folder is None:
            return
        trainer.save_checkpoint(self.folder / self.file, weights_only=False)
        if trainer.is_global_zero:
            write_history(self.folder, [*self.earlier, *module.history])


def write_history(folder: Path, history: list[HistoryRow]) -> None:
    """``history.csv``, whole or not at all."""
    columns = list(dict.fromkeys(key for row in history for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text_atomic(folder / "history.csv", text.getvalue())


def restore(module: PTQSearch, path: Path | None) -> None:
    """Put the state of an earlier search back into ``module``; nothing where there was none."""
    if path is not None:
        module.on_load_checkpoint(AtomicCheckpoints().load_checkpoint(path))


def resumable_step(folder: Path | None, decisions: Iterable[str]) -> tuple[Path | None, int]:
    """The checkpoint to go on from and its step; ``(None, 0)`` where there is none.

    Raises:
        StrategyError: if the checkpoint is damaged or of another search.
    """
    path = None if folder is None else folder / LAST
    if path is None or not path.exists():
        return None, 0
    try:
        checkpoint = AtomicCheckpoints().load_checkpoint(path)
        step, found = int(checkpoint["global_step"]), set(checkpoint["state_dict"])
    except Exception as error:
        raise StrategyError(f"{path}: not a checkpoint of a search; remove it to start again") from error
    if found != {f"logits.{name}" for name in decisions}:
        raise StrategyError(f"{path}: made for other decisions; remove it to start again")
    return path, step

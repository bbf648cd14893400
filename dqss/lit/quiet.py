"""Lightning's remarks that mislead or say nothing here; everything else comes through."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_REMARKS = re.compile(
    r"(GPU|TPU) available: "
    r"|💡 Tip: For seamless cloud logging"
    r"|`Trainer\.fit` stopped: `max_steps="
    r"|`weights_only` was not set"
    r"|Restor(ing states from|ed all states from) the checkpoint"
)
_WARNINGS = (
    # The network stays in eval mode on purpose.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # Lightning calls torch in a way that torch calls outdated.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # The folder is that of the interrupted run, and its rows are logged again.
    r"Experiment logs directory .* exists and is not empty",
)
_LOGGERS = (
    "pytorch_lightning.utilities.rank_zero",
    "pytorch_lightning.trainer.connectors.checkpoint_connector",
    "lightning_fabric.utilities.rank_zero",
)


def _tells(record: logging.LogRecord) -> bool:
    return _REMARKS.match(record.getMessage()) is None


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave out those remarks inside."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(_tells)
    try:
        with warnings.catch_warnings():
            for text in _WARNINGS:
                warnings.filterwarnings("ignore", message=text)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_tells)

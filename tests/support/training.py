"""The shortest way to a QAT search on a small network."""

from typing import Any

import torch
from torch import Tensor, nn

from dqss.io import Journal
from dqss.lit.objective import Objective
from dqss.lit.qat import Phase, QATTraining
from dqss.lit.qat_search import QATResult, search_qat
from dqss.lit.qat_settings import QATSettings
from dqss.lit.schedules import SoftmaxSchedule
from dqss.lit.training_data import TrainingData
from dqss.lit.updates import SinglePass, Update
from dqss.losses import KLDivergence
from dqss.measure import Evaluator, Meter
from dqss.prepare import prepare
from dqss.progress import Interrupted, Reporter
from dqss.samples import Samples
from dqss.space import SearchSpace
from dqss.trainable import TrainableSupernet
from search_spaces import learned

WEIGHTS, ACTIVATIONS = ("lsq", "dorefa", "minmax"), ("lsq", "lsq_plus", "pact")
SPACE: SearchSpace = learned(3, 3, WEIGHTS, ACTIVATIONS)
CPU = {"accelerator": "cpu"}


def pairs(count: int = 48, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs ``[count, 3, 6, 6]`` and labels that can be learned."""
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(classes, (count,), generator=generator)
    images = torch.randn(count, 3, 6, 6, generator=generator)
    return images + labels[:, None, None, None] / 2, labels


def trainable(model: nn.Module, space: SearchSpace = SPACE, fold: bool = False) -> TrainableSupernet:
    """A calibrated supernet whose network learns."""
    images, _ = pairs()
    prepared = prepare(model, images[:2], without=() if fold else ("fold_batch_norm",))
    supernet = TrainableSupernet(prepared.model, space)
    samples = Samples(list(images))
    evaluator = Evaluator(
        supernet, samples, {}, KLDivergence(), 16, torch.device("cpu"), Meter(), Journal.open(None)
    )
    supernet.calibrate([images], probes=evaluator.probes(range(16)), distance=KLDivergence())
    return supernet


def training(
    supernet: TrainableSupernet,
    batches: int = 6,
    warmup: float = 0.0,
    update: Update | None = None,
    **changes: Any,
) -> QATTraining:
    """A phase of search on :func:`pairs`, not begun."""
    settings = QATSettings(**{"batch_size": 8, "record_every": 1, **changes})
    phase = Phase("search", batches, warmup, SoftmaxSchedule(), update or SinglePass())
    objective = Objective(nn.Identity(), KLDivergence())
    return QATTraining(supernet, phase, objective, TrainingData.of(pairs()), settings, seed=3)


def tiny_search(model: nn.Module, space: SearchSpace = SPACE, **options: Any) -> QATResult:
    """Twelve steps of search and six of tuning."""
    images, labels = pairs()
    changes = options.pop("changes", {})
    settings = QATSettings(
        **{
            "epochs": 2,
            "tune_epochs": 1,
            "batch_size": 8,
            "record_every": 1,
            "checkpoint_every": 2,
            **changes,
        }
    )
    trainer = {**CPU, **options.pop("trainer", {})}
    return search_qat(model, (images, labels), images, space, settings, seed=3, trainer=trainer, **options)


class Stopping(Reporter):
    """Asks to stop after so many pieces of a stage."""

    def __init__(self, name: str, after: int) -> None:
        super().__init__()
        self.name, self.after = name, after

    def stage(self, name: str, total: int):
        return super().stage(name, total) if name != self.name else _Counted(self)


class _Counted:
    def __init__(self, reporter: Stopping) -> None:
        self.reporter, self.done = reporter, 0

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        if self.done >= self.reporter.after:
            raise Interrupted(15)

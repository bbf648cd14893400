"""From a model and a few inputs to a calibrated supernet that can be trained, and its teacher."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dqss.calls import call_model, first_tensor
from dqss.errors import DataError, NonFiniteError
from dqss.io import Journal
from dqss.lit.build import left_out
from dqss.lit.identity import JOURNAL, SearchIdentity, options_sha256, settings_words
from dqss.lit.pictures import check_pictures
from dqss.lit.qat_settings import QATSettings
from dqss.lit.ranks import rank
from dqss.lit.training_data import TrainingData
from dqss.losses import Distance, default_distance
from dqss.measure import Evaluator, Meter, batches, home, to_device
from dqss.prepare import Prepared, prepare
from dqss.progress import Reporter
from dqss.samples import Samples, inputs_sha256
from dqss.space import SearchSpace
from dqss.trainable import TrainableSupernet

CALIBRATION_BATCH = 32
FOLD = "fold_batch_norm"


@dataclass(frozen=True)
class Trainable:
    """What a QAT search works on.

    Attributes:
        prepared: the recipe, and hashes of the original network.
        supernet: calibrated; its network learns.
        teacher: the prepared float network, frozen.
        distance: to the teacher.
        journal: remembers what was measured.
    """

    prepared: Prepared
    supernet: TrainableSupernet
    teacher: nn.Module
    distance: Distance
    journal: Journal


def build_qat(
    model: nn.Module,
    samples: Samples,
    train: TrainingData,
    space: SearchSpace,
    settings: QATSettings,
    seed: int,
    folder: Path | None,
    device: torch.device,
    reporter: Reporter,
) -> Trainable:
    """Prepare the network, attach the decisions, calibrate all candidates in one pass over ``samples``.

    Every process of a distributed training does the same with the same inputs.
    """
    if len(samples) < 2:
        raise DataError(f"{len(samples)} calibration inputs: at least 2 are needed")
    check_pictures(model, samples)
    skipped = left_out(model, space)
    size = CALIBRATION_BATCH if samples.uniform else 1
    first = samples.batch(range(min(size, len(samples))))
    without = () if settings.fold_batch_norm else (FOLD,)
    prepared = prepare(
        model, to_device(first, home(model)), skip=lambda name: name in skipped, without=without
    )
    teacher = copy.deepcopy(prepared.model).to(device).requires_grad_(False)
    with torch.no_grad():
        output = first_tensor(call_model(teacher, to_device(first, device)))
    distance = settings.distance or default_distance(output)
    supernet = TrainableSupernet(prepared.model, space, settings.compensate).to(device)
    journal = Journal.open(None if folder is None or rank() else folder / JOURNAL)
    _calibrate(supernet, samples, size, distance, device, reporter)
    if folder is not None:
        _identity(prepared, samples, train, supernet, settings, distance, seed).check(journal)
    return Trainable(prepared, supernet, teacher, distance, journal)


def _calibrate(
    supernet: TrainableSupernet,
    samples: Samples,
    size: int,
    distance: Distance,
    device: torch.device,
    reporter: Reporter,
) -> None:
    known = range(len(samples))
    runs = batches(known, size)
    evaluator = Evaluator(supernet, samples, {}, distance, size, device, Meter(), Journal.open(None))
    with reporter.stage("calibrate", len(known)) as stage:

        def seen(position: int, output: Any) -> None:
            if not torch.isfinite(first_tensor(output)).all():
                raise NonFiniteError("the float model's output is NaN or infinite on the calibration inputs")
            stage.advance(len(runs[position]))

        inputs = (to_device(samples.batch(run), device) for run in runs)
        supernet.calibrate(inputs, seen, evaluator.probes(known), distance)


def _identity(
    prepared: Prepared,
    samples: Samples,
    train: TrainingData,
    supernet: TrainableSupernet,
    settings: QATSettings,
    distance: Distance,
    seed: int,
) -> SearchIdentity:
    return SearchIdentity(
        {
            "weights": prepared.weights_sha256,
            "inputs": inputs_sha256(samples),
            "training data": f"{type(train.items).__name__} of {len(train)}",
            "seed": str(seed),
            "settings": f"{settings_words(settings, max_minutes=None, checkpoint_every=1)} {distance.name}",
            "search space": options_sha256(supernet),
        }
    )

"""The whole QAT search: calibrate, search, argmax, tune, measure, write down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn

from dqss import __version__
from dqss.apply import apply_strategy, make_bundle
from dqss.bundle import Bundle
from dqss.calls import call_model
from dqss.io import ensure_folder, write_json_atomic
from dqss.lit.batch_norm import reestimate
from dqss.lit.checkpoint import Deadline, write_history
from dqss.lit.clock import Clock
from dqss.lit.contenders import Validation
from dqss.lit.device import device_of
from dqss.lit.objective import Objective
from dqss.lit.qat import Phase, QATTraining
from dqss.lit.qat_build import CALIBRATION_BATCH, Trainable, build_qat
from dqss.lit.qat_fit import fit_qat
from dqss.lit.qat_settings import QATSettings, Start
from dqss.lit.ranks import rank
from dqss.lit.record import training_record
from dqss.lit.stepped import HistoryRow
from dqss.lit.training_data import Steps, TrainingData
from dqss.lit.trajectory import TRAJECTORY_FILE
from dqss.lit.updates import SinglePass
from dqss.measure import batches, measure_networks, to_device
from dqss.prepare.modules import unwrap
from dqss.progress import Reporter
from dqss.report import write_report
from dqss.samples import Samples
from dqss.space import SearchSpace
from dqss.strategy import ModelInfo, utc_now
from dqss.supernet import Assignment
from dqss.trainable import TrainableSupernet

SEARCH_SHARE = 0.5
"""Share of ``max_minutes`` at which the search stops."""
SEARCH, TUNE = "search", "tune"


@dataclass(frozen=True)
class QATResult:
    """What a QAT search found.

    Attributes:
        bundle: strategy, grids, and the tuned network's tensors, as written to the run folder.
        metrics: as in ``metrics.json``.
        history: rows of the search, then of the tuning.
        supernet: as it stands in the end.
        model: the original float network.
    """

    bundle: Bundle
    metrics: dict[str, Any]
    history: list[HistoryRow]
    supernet: TrainableSupernet
    model: nn.Module

    def quantized(self) -> nn.Module:
        """The quantized network with its tuned weights, rebuilt from the original model and the bundle."""
        return apply_strategy(self.model, self.bundle)


def search_qat(
    model: nn.Module,
    train: Any,
    inputs: Samples | Tensor | Iterable[Any],
    search_space: SearchSpace,
    settings: QATSettings | None = None,
    *,
    validation: Validation | None = None,
    run_dir: str | Path | None = None,
    seed: int = 0,
    info: ModelInfo | None = None,
    reporter: Reporter | None = None,
    trainer: Mapping[str, Any] | None = None,
    logger: Logger | bool = False,
) -> QATResult:
    """Find a strategy while training the network for it, in one pass (arXiv 2404.08010), and tune it.

    Args:
        model: any trained module; it is not changed.
        train: what to train with: a DataLoader, a map-style dataset of pairs, or two tensors; see
            :meth:`TrainingData.of`. Batches are a function of seed and step.
        inputs: a few hundred inputs to calibrate with, as :func:`dqss.search_ptq` takes them.
        search_space: which layers, which candidates.
        settings: see :class:`QATSettings`.
        validation: data to report on; nothing is chosen with it.
        run_dir: where results and checkpoints go; an interrupted search that is started again with
            the same arguments goes on from there. None keeps everything in memory.
        seed: of batches, augmentation, noise and dropout.
        info: where the model came from, for the strategy file.
        reporter: progress; silent by default.
        trainer: further arguments of :class:`pytorch_lightning.Trainer`: ``devices``, ``strategy``,
            ``precision``, ``gradient_clip_val``, ``accumulate_grad_batches``, ``callbacks`` ...
        logger: of Lightning.

    Raises:
        UserError: for inputs, models or search spaces that cannot be searched.
    """
    settings, reporter, clock = settings or QATSettings(), reporter or Reporter(), Clock()
    deadline = Deadline(settings.max_minutes)
    folder = None if run_dir is None else ensure_folder(run_dir)
    device = device_of(trainer or {})
    samples = inputs if isinstance(inputs, Samples) else Samples.of(inputs)
    data = TrainingData.of(train)
    with clock.time("calibrate"):
        work = build_qat(model, samples, data, search_space, settings, seed, folder, device, reporter)
    run = _Run(work, data, samples, settings, seed, folder, deadline, reporter, trainer or {}, logger)
    initial = {key: value.clone() for key, value in work.supernet.state_dict().items()}
    with clock.time(SEARCH):
        searched = run.search()
        history = searched.history
        assignment = work.supernet.argmax()
        run.take(assignment)
    with clock.time("report"):
        rows = run.measure("argmax", validation or Validation())
    if settings.tune_epochs > 0:
        with clock.time(TUNE):
            history = [*history, *run.tune(assignment, initial, history)]
        with clock.time("report"):
            rows |= run.measure("searched", validation or Validation())
    else:
        rows["searched"] = rows["argmax"]
    metrics = {
        "float": rows["float"],
        "best_uniform": None,  # each would be a training of its own: see experiments/cifar_qat
        "argmax": rows["argmax"],
        "searched": rows["searched"],
        "distance": work.distance.name,
        "steps": run.steps,
        "seconds": clock.seconds,
    }
    bundle = make_bundle(
        work.supernet,
        assignment,
        work.prepared,
        info or _from_python(model),
        samples.batch([0]),
        work.supernet.network_state(),
        dqss=__version__,
        created=utc_now(),
        search_space=search_space.name,
        method="qat",
        seed=seed,
        budget=None,
        metrics={name: metrics[name] for name in ("searched", "float")},
    )
    if folder is not None and rank() == 0:
        write_history(folder, history)
        write_json_atomic(folder / "metrics.json", metrics)
        bundle = bundle.save(folder)
        searched.trajectory.save(folder / TRAJECTORY_FILE)
        loss = "the data's loss" if settings.distillation == 0 else work.distance.name
        training_record(work.supernet, assignment, searched.effects, loss, device).save(folder)
        write_report([folder])
    return QATResult(bundle, metrics, history, work.supernet, model)


@dataclass
class _Run:
    """The phases of one search, and what they share."""

    work: Trainable
    data: TrainingData
    samples: Samples
    settings: QATSettings
    seed: int
    folder: Path | None
    deadline: Deadline
    reporter: Reporter
    trainer: Mapping[str, Any]
    logger: Logger | bool
    steps: int = 0

    def search(self) -> QATTraining:
        """Everything learns."""
        settings = self.settings
        phase = Phase(
            SEARCH,
            self._batches(settings.epochs),
            settings.warmup,
            settings.schedule,
            settings.update,
            span=(0.0, self._turn()[0]),
        )
        searched = self._fit(phase, SEARCH_SHARE, ())
        searched.trajectory.keep()
        return searched

    def tune(
        self, assignment: Assignment, initial: Mapping[str, Tensor], earlier: list[HistoryRow]
    ) -> list[HistoryRow]:
        """The network of the argmax learns alone, from where the settings say."""
        supernet = self.work.supernet
        if self.settings.start is Start.FLOAT:
            logits = {key: value for key, value in supernet.state_dict().items() if key.endswith(".logits")}
            supernet.load_state_dict({**initial, **logits})
            supernet.fix(assignment)
        span = (self._turn()[1], 1.0)
        phase = Phase(TUNE, self._batches(self.settings.tune_epochs), 0.0, None, SinglePass(), span)
        rows = self._fit(phase, 1.0, earlier).history
        supernet.eval()
        offset = earlier[-1]["step"] if earlier else 0
        return [{**row, "step": offset + row["step"]} for row in rows]

    @torch.no_grad()
    def take(self, assignment: Assignment) -> None:
        """Leave one option of each decision, and estimate batch norms anew for it."""
        supernet = self.work.supernet
        supernet.fix(assignment)
        plan = self.settings.update.plans(len(self.data), self.settings.batch_size, self.seed)[0]
        device = next(supernet.parameters()).device
        steps = Steps(self.data, [plan])
        known = range(min(self.settings.norm_batches, plan.per_epoch))
        inputs = (to_device(steps[step][0], device) for step in known)
        with supernet.mode("discrete"):
            reestimate(supernet, inputs)

    def measure(self, name: str, validation: Validation) -> dict[str, Any]:
        """Rows of ``metrics.json`` for the float network and, under ``name``, the present one."""
        key = f"measured {name}"
        known = self.work.journal.get(key)
        if known is None:
            known = self._measured(name, validation)
            self.work.journal.put(key, known)
        return known

    def _measured(self, name: str, validation: Validation) -> dict[str, Any]:
        parts = {"selection": self._calibration(), "validation": validation.batches}
        rows: dict[str, Any] = {row: {"name": row} for row in ("float", name)}
        supernet = self.work.supernet
        device = next(supernet.parameters()).device
        with self.reporter.stage("measure", len(self.samples)) as stage, supernet.mode("discrete"):
            networks = {"float": None, name: lambda given: call_model(supernet.eval(), given)}
            for part, stream in parts.items():
                found = measure_networks(
                    lambda given: call_model(self.work.teacher, given),
                    stream,
                    networks,
                    self.work.distance,
                    validation.metric,
                    device,
                    stage.advance,
                )
                for row, values in found.items():
                    if "metric" in values:
                        values[validation.metric_name] = values.pop("metric")
                    rows[row][part] = values if values["count"] else None
        return rows

    def _calibration(self) -> Iterable[Any]:
        size = CALIBRATION_BATCH if self.samples.uniform else 1
        for indices in batches(range(len(self.samples)), size):
            yield self.samples.batch(indices), self.samples.targets(indices)

    def _turn(self) -> tuple[float, float]:
        """Where on the curve of learning rates the search ends and where the tuning begins."""
        settings = self.settings
        if settings.restart or settings.start is Start.FLOAT:
            return 1.0, 0.0
        share = settings.epochs / (settings.epochs + settings.tune_epochs)
        return share, share

    def _fit(self, phase: Phase, share: float, earlier: Iterable[HistoryRow]) -> QATTraining:
        settings, work = self.settings, self.work
        objective = Objective(work.teacher, work.distance, settings.loss, settings.distillation)
        accumulate = int(self.trainer.get("accumulate_grad_batches", 1))
        module = QATTraining(work.supernet, phase, objective, self.data, settings, self.seed, accumulate)
        fit_qat(
            module, self.folder, self.deadline, share, self.reporter, self.trainer, self.logger, list(earlier)
        )
        self.steps += module.steps
        return module

    def _batches(self, epochs: float) -> int:
        """Of so many passes over the training data."""
        plan = SinglePass().plans(len(self.data), self.settings.batch_size, self.seed)[0]
        return max(1, round(epochs * plan.per_epoch))


def _from_python(model: nn.Module) -> ModelInfo:
    return ModelInfo(
        source="python", name=type(unwrap(model)).__name__, weights_sha256="", tensors={}, prepare=[]
    )

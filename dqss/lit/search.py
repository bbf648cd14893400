"""The whole post-training search: calibrate, search, discretize, compare, write down."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor, nn

from dqss import __version__
from dqss.apply import apply_strategy, make_bundle
from dqss.bundle import Bundle
from dqss.calls import call_model, first_tensor
from dqss.discretize import Discretized, discretize
from dqss.errors import DataError, NonFiniteError, UserError, near_match
from dqss.io import Journal, ensure_folder, write_json_atomic
from dqss.layers import searchable_layers
from dqss.lit.checkpoint import (
    AtomicCheckpoints,
    Deadline,
    SafeKeeping,
    restore,
    resumable_step,
    write_history,
)
from dqss.lit.contenders import Validation, measure_contenders
from dqss.lit.identity import JOURNAL, search_identity
from dqss.lit.ptq import HistoryRow, PTQSearch, StepBatches
from dqss.lit.quiet import quiet_lightning
from dqss.lit.settings import PTQSettings
from dqss.losses import default_distance
from dqss.measure import Evaluator, Meter, batches, home, to_device
from dqss.prepare import Prepared, prepare
from dqss.prepare.modules import canonical_name, unwrap
from dqss.progress import Reporter
from dqss.samples import Samples, split
from dqss.space import SearchSpace
from dqss.strategy import ModelInfo, utc_now
from dqss.supernet import Supernet
from dqss.uniform import uniform_assignments

ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
SEARCH_SHARE, REFINE_SHARE = 0.6, 0.85
"""Shares of ``max_minutes`` at which the search and its refinement stop."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        bundle: strategy and tensors, as written to the run folder.
        metrics: as in ``metrics.json``.
        history: a row a step.
        discretized: all contenders and their distance on the selection part.
        supernet: as it stands after the search.
        model: the original float network.
    """

    bundle: Bundle
    metrics: dict[str, Any]
    history: list[HistoryRow]
    discretized: Discretized
    supernet: Supernet
    model: nn.Module

    def quantized(self) -> nn.Module:
        """The quantized network, rebuilt from the original model and the bundle."""
        return apply_strategy(self.model, self.bundle)


def search_ptq(
    model: nn.Module,
    inputs: Samples | Tensor | Iterable[Any],
    search_space: SearchSpace,
    settings: PTQSettings | None = None,
    *,
    validation: Validation | None = None,
    run_dir: str | Path | None = None,
    seed: int = 0,
    info: ModelInfo | None = None,
    reporter: Reporter | None = None,
    trainer: Mapping[str, Any] | None = None,
    logger: Logger | bool = False,
) -> SearchResult:
    """Find a quantization strategy for every layer of a trained network (arXiv 2404.08010).

    Args:
        model: any module; it is not changed.
        inputs: a few hundred inputs: a tensor ``[N, ...]``, or an iterable of batches, each
            a tensor, a tuple (positional arguments) or a dict (keyword arguments).
        search_space: which layers, which candidates; see :mod:`dqss.search_spaces`.
        settings: see :class:`PTQSettings`.
        validation: labelled or unlabelled data to report on; nothing is chosen with it.
        run_dir: where results and checkpoints go; an interrupted search that is started
            again with the same arguments goes on from there. None keeps everything in memory.
        seed: of the parts, the batches and the noise.
        info: where the model came from, for the strategy file.
        reporter: progress; silent by default.
        trainer: further arguments of :class:`pytorch_lightning.Trainer`.
        logger: of Lightning.

    Returns:
        The strategy and all that was measured. On the selection part it is never worse than
        the best uniform strategy.

    Raises:
        UserError: for inputs, models or search spaces that cannot be searched.
    """
    settings, reporter = settings or PTQSettings(), reporter or Reporter()
    clock = _Clock()
    deadline = Deadline(settings.max_minutes)
    folder = None if run_dir is None else ensure_folder(run_dir)
    device = _device(trainer or {})
    samples = inputs if isinstance(inputs, Samples) else Samples.of(inputs)
    with clock.time("calibrate"):
        prepared, evaluator = build(model, samples, search_space, settings, seed, folder, device, reporter)
    with clock.time("search"):
        module = _fit(evaluator, settings, seed, folder, deadline, reporter, trainer or {}, logger)
        evaluator.supernet.to(device)
    uniform = uniform_assignments(evaluator.supernet)
    planned = int(settings.refine.passes * len(evaluator.parts["refine"]))
    with clock.time("discretize"), reporter.stage("discretize", planned) as stage:
        # Not before: a step of the search ends in a checkpoint of its own.
        evaluator.advance = stage.advance
        # Now, and not with the first measurement: a resumed run may find that in its journal.
        evaluator.reference(evaluator.parts["select"])
        outcome = discretize(
            evaluator,
            uniform,
            settings.refine,
            settings.finalists,
            out_of_time=lambda: deadline.passed(REFINE_SHARE),
        )
    cost = {"steps": len(module.history), "evaluations": evaluator.meter.evaluations}
    with clock.time("report"):
        oracle = settings.oracle and not deadline.passed(REFINE_SHARE)
        measured = measure_contenders(evaluator, outcome, uniform, validation, oracle, reporter)
    metrics = {**measured, **cost, "seconds": clock.seconds}
    bundle = make_bundle(
        evaluator.supernet,
        outcome.assignments[outcome.exported],
        prepared,
        info
        or ModelInfo(
            source="python", name=type(unwrap(model)).__name__, weights_sha256="", tensors={}, prepare=[]
        ),
        samples.batch(evaluator.parts["search"][:1]),
        dqss=__version__,
        created=utc_now(),
        search_space=search_space.name,
        method="ptq",
        seed=seed,
        budget=None,
        metrics={name: measured[name] for name in ("searched", "best_uniform", "float")},
    )
    if folder is not None:
        write_history(folder, module.history)
        write_json_atomic(folder / "metrics.json", metrics)
        bundle = bundle.save(folder)
    return SearchResult(bundle, metrics, module.history, outcome, evaluator.supernet, model)


def build(
    model: nn.Module,
    samples: Samples,
    space: SearchSpace,
    settings: PTQSettings,
    seed: int,
    folder: Path | None,
    device: torch.device,
    reporter: Reporter,
) -> tuple[Prepared, Evaluator]:
    """Prepare the network, attach the decisions and calibrate all candidates in one pass.

    Calibration sees the part that is searched on; the selection part stays untouched. Where some
    candidate needs gradients, some of the inputs are run once more, forward and backward.
    """
    if len(samples) < 2:
        raise DataError(f"{len(samples)} calibration inputs: at least 2 are needed")
    searched, selected = split(len(samples), settings.parts, seed)
    # Shared: more images for both did more than disjoint ones (experiments/cifar_resnet20).
    parts = {"search": searched, "refine": searched, "select": selected}
    size = settings.batch_size if samples.uniform else 1
    known = sorted(searched)
    left_out = _left_out(model, space)
    first = samples.batch(known[:size])
    prepared = prepare(model, to_device(first, home(model)), skip=lambda name: name in left_out)
    prepared.model.to(device)
    with torch.no_grad():
        output = first_tensor(call_model(prepared.model, to_device(first, device)))
    distance = settings.distance or default_distance(output)
    supernet = Supernet(prepared.model, space).to(device)
    journal = Journal.open(None if folder is None else folder / JOURNAL)
    evaluator = Evaluator(supernet, samples, parts, distance, size, device, Meter(), journal)
    runs = batches(known, evaluator.forward_size)
    with reporter.stage("calibrate", len(known)) as stage:

        def keep(position: int, output: Any) -> None:
            indices = runs[position]
            if not torch.isfinite(first_tensor(output)).all():
                raise NonFiniteError("the float model's output is NaN or infinite on the calibration inputs")
            evaluator.keep_reference(indices, output)
            evaluator.meter.forward(len(indices))
            stage.advance(len(indices))

        inputs = (to_device(samples.batch(run), device) for run in runs)
        supernet.calibrate(inputs, keep, evaluator.probes(known), distance)
    if folder is not None:
        search_identity(prepared, samples, supernet, settings, distance, seed).check(journal)
    return prepared, evaluator


def _left_out(model: nn.Module, space: SearchSpace) -> set[str]:
    """Names of the layers that stay in float, as they are once ``prepare`` has unwrapped them."""
    layers = (
        replace(info, name=canonical_name(model, name))
        for name, (_, info) in searchable_layers(model).items()
    )
    return {info.name for info in layers if space.candidates(info) is None}


def _fit(
    evaluator: Evaluator,
    settings: PTQSettings,
    seed: int,
    folder: Path | None,
    deadline: Deadline,
    reporter: Reporter,
    trainer: Mapping[str, Any],
    logger: Logger | bool,
) -> PTQSearch:
    checkpoint, start = resumable_step(folder, list(evaluator.supernet.decisions))
    plan = StepBatches(evaluator.parts["search"], evaluator.batch_size, settings.steps, seed, start)
    module = PTQSearch(
        evaluator,
        plan,
        settings.schedule,
        settings.loss or evaluator.distance,
        settings.learning_rate,
        settings.discrete_every,
        settings.discrete_images,
    )
    with reporter.stage("search", settings.steps) as stage:
        stage.advance(start)
        keeping = SafeKeeping(folder, settings.checkpoint_every, deadline, SEARCH_SHARE, reporter, stage)
        with quiet_lightning():
            runner = _runner(settings.steps, keeping, logger, trainer)
            try:
                if start < settings.steps:
                    runner.fit(module, ckpt_path=checkpoint)
                else:
                    restore(module, checkpoint)
            except SIGTERMException:
                # Lightning saw the signal before the reporter was asked; the answer is the same.
                reporter.check()
                raise
    module.settle()
    return module


def _runner(
    steps: int, keeping: SafeKeeping, logger: Logger | bool, trainer: Mapping[str, Any]
) -> pl.Trainer:
    if trainer.get("devices", 1) not in (1, "1", [0]) or trainer.get("num_nodes", 1) != 1:
        raise UserError("trainer: a PTQ search runs on one device; leave out trainer.devices and num_nodes")
    accelerator = "gpu" if _device(trainer).type == "cuda" else "cpu"
    options: dict[str, Any] = {"devices": 1, **trainer, "accelerator": accelerator}
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
            **options,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 3)


def _device(trainer: Mapping[str, Any]) -> torch.device:
    wanted = trainer.get("accelerator", "auto")
    if wanted not in ACCELERATORS:
        hint = near_match(str(wanted), ACCELERATORS)
        raise UserError(f"trainer.accelerator={wanted}{hint}: expected one of {', '.join(ACCELERATORS)}")
    if wanted != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if wanted in ("gpu", "cuda"):
        raise UserError(f"trainer.accelerator={wanted}: torch finds no CUDA device; use auto or cpu")
    return torch.device("cpu")

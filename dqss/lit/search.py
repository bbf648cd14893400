"""The whole post-training search: calibrate, search, discretize, compare, write down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from torch import Tensor, nn

from dqss import __version__
from dqss.apply import apply_strategy, make_bundle
from dqss.budget.limits import Budget
from dqss.bundle import Bundle
from dqss.discretize import Discretized
from dqss.errors import UserError
from dqss.io import ensure_folder, write_json_atomic
from dqss.lit.again import search_activations
from dqss.lit.build import build, limits_of
from dqss.lit.checkpoint import Deadline, write_history
from dqss.lit.choose import REFINE_SHARE, choose
from dqss.lit.clock import Clock
from dqss.lit.contenders import REPAIRED, Validation, measure_contenders
from dqss.lit.device import device_of
from dqss.lit.ptq import PTQSearch
from dqss.lit.ranks import rank
from dqss.lit.record import record
from dqss.lit.settings import PTQSettings
from dqss.lit.stepped import HistoryRow
from dqss.lit.trajectory import TRAJECTORY_FILE
from dqss.measure import Evaluator
from dqss.precision import full_precision
from dqss.prepare.modules import unwrap
from dqss.progress import Reporter
from dqss.recompute import recomputing
from dqss.repair import RepairSettings, check_samples, repair_strategy
from dqss.report import write_report
from dqss.report.pictures import PICTURES, write_pictures
from dqss.samples import Samples
from dqss.space import SearchSpace
from dqss.strategy import ModelInfo, utc_now
from dqss.supernet import Supernet


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


@full_precision()
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
    report_images: int = 8,
    budget: Budget | None = None,
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
        report_images: inputs shown in ``report.html``, those that change most; 0 for none, where
            the page may be seen by people who may not see the inputs.
        budget: what the exported network may cost, instead of the settings' own.

    Returns:
        The strategy and all that was measured. In the mean of the part that was searched on and the
        selection part it is never worse than the best uniform strategy, of those within the budget if
        there is one. What repair makes of it takes its place where that is better on the selection part.

    Raises:
        UserError: for inputs, models or search spaces that cannot be searched.
    """
    settings, reporter = settings or PTQSettings(), reporter or Reporter()
    if report_images < 0:
        raise UserError(f"report_images={report_images}: expected 0 or more")
    settings = settings if budget is None else replace(settings, budget=budget)
    clock = Clock()
    deadline = Deadline(settings.max_minutes)
    folder = None if run_dir is None else ensure_folder(run_dir)
    device = device_of(trainer or {})
    samples = inputs if isinstance(inputs, Samples) else Samples.of(inputs)
    if settings.repair is not None:
        check_samples(samples, settings.repair)
    with clock.time("calibrate"):
        prepared, evaluator = build(model, samples, search_space, settings, seed, folder, device, reporter)
    limits = limits_of(settings.budget, evaluator)
    chosen = choose(
        evaluator,
        settings,
        seed,
        folder,
        reporter,
        trainer or {},
        logger=logger,
        limits=limits,
        deadline=deadline,
        clock=clock,
    )
    module, outcome, exported = chosen.module, chosen.outcome, chosen.exported
    cost = {"steps": len(module.history), "evaluations": evaluator.meter.evaluations}
    bundle = make_bundle(
        evaluator.supernet,
        exported,
        prepared,
        info or _from_python(model),
        samples.batch(evaluator.parts["search"][:1]),
        dqss=__version__,
        created=utc_now(),
        search_space=search_space.name,
        method="ptq",
        seed=seed,
        budget=None if module.steering is None else module.steering.record(exported),
    )
    tuned, network = None, None
    if settings.repair is not None:
        with clock.time("repair"):
            tuned = _repair(model, bundle, evaluator, settings.repair, folder, seed, reporter)
        if settings.search_again:
            with clock.time("search_again"):
                place: dict[str, Any] = {"seed": seed, "folder": folder, "device": device}
                tuned = search_activations(
                    model, tuned, samples, search_space, settings, reporter, trainer or {}, **place
                )
        network = apply_strategy(model, tuned).to(device)
    with clock.time("report"):
        oracle = settings.oracle and not deadline.passed(REFINE_SHARE)
        measured = measure_contenders(
            evaluator, outcome, chosen.uniform, validation, oracle, reporter, network
        )
    metrics = {**measured, **cost, "seconds": clock.seconds}
    if tuned is not None and measured["searched"]["name"] == REPAIRED:
        bundle = tuned
    else:
        network = None
    kept = {name: measured[name] for name in ("searched", "best_uniform", "float")}
    bundle = replace(bundle, strategy=bundle.strategy.with_metrics(kept))
    if folder is not None and rank() == 0:
        write_history(folder, module.history)
        write_json_atomic(folder / "metrics.json", metrics)
        _record(folder, evaluator, outcome, module, settings, report_images, network)
        # With the strategy a search counts as finished; the page can be made again at any time.
        bundle = bundle.save(folder)
        write_report([folder])
    return SearchResult(bundle, metrics, module.history, outcome, evaluator.supernet, model)


def _repair(
    model: nn.Module,
    bundle: Bundle,
    evaluator: Evaluator,
    settings: RepairSettings,
    folder: Path | None,
    seed: int,
    reporter: Reporter,
) -> Bundle:
    """On the inputs that were searched on: the selection part stays untouched."""
    inputs = evaluator.samples.subset(evaluator.parts["search"])
    place = folder if rank() == 0 else None
    options: dict[str, Any] = {"seed": seed, "reporter": reporter, "device": evaluator.device}
    options["distance"] = evaluator.distance
    return repair_strategy(model, bundle, inputs, settings, folder=place, **options).bundle


def _record(
    folder: Path,
    evaluator: Evaluator,
    outcome: Discretized,
    module: PTQSearch,
    settings: PTQSettings,
    images: int,
    network: nn.Module | None,
) -> None:
    evaluator.advance = lambda images: None
    module.trajectory.save(folder / TRAJECTORY_FILE)
    loss = settings.loss or evaluator.distance
    name = str(getattr(loss, "name", type(loss).__name__))
    with recomputing(evaluator.supernet, settings.recompute or ()):
        found = record(evaluator, outcome, module.effects, name, images, network)
    found.save(folder)
    if found.pictures:
        for number, example in enumerate(found.examples):
            write_pictures(example.pictures, folder / PICTURES, str(number))


def _from_python(model: nn.Module) -> ModelInfo:
    return ModelInfo(
        source="python", name=type(unwrap(model)).__name__, weights_sha256="", tensors={}, prepare=[]
    )

"""``python -m dqss.search``: find a quantization strategy for a trained network."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from dqss import cli, sweep
from dqss.budget import Budget
from dqss.cli import CONFIG_FILE
from dqss.deploy.targets import target_named
from dqss.errors import BudgetError, OutputError, UserError
from dqss.io import ensure_folder, write_text_atomic
from dqss.lit.contenders import Validation
from dqss.lit.identity import JOURNAL
from dqss.lit.qat_search import QATResult, search_qat
from dqss.lit.qat_settings import QATSettings
from dqss.lit.quiet import quiet_lightning
from dqss.lit.ranks import rank, world_size
from dqss.lit.search import SearchResult, search_ptq
from dqss.lit.settings import PTQSettings
from dqss.lit.summary import print_plan, print_qat_plan, print_result
from dqss.lit.tracking import track_config, track_result
from dqss.lit.training_data import TrainingData
from dqss.models import LoadedModel
from dqss.progress import ConsoleReporter, Interrupted, Reporter
from dqss.space import SearchSpace
from dqss.strategy import STRATEGY_FILE, ModelInfo

OPTIONS = {"seed": int, "threads": int | None, "dry_run": bool, "run_dir": str}
LATER_OPTIONS = {"target": str | None, "report_images": int, "progress": str}
"""Those that the configuration of an older run may lack."""
GROUPS = ("model", "data", "search_space", "method")
BUDGET = "budget"
"""A group that configurations of older runs do not have."""
FREE_OF_METHOD = ("max_minutes", "recompute")
FREE_OPTIONS = ("report_images", "progress")
FREE = ("hydra", "logger", *FREE_OPTIONS, *(f"method.{key}" for key in FREE_OF_METHOD), "resume")
"""What the command line may say anew when a search is resumed: it does not change the result."""


FAILURES = sweep.Failures()
sweep.register(f"method.{key}" for key in FREE_OF_METHOD)


@cli.command("search")
def main(config: DictConfig) -> float | None:
    """Compose, search, print; returns the searched distance on the selection part, for sweeps."""
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        return _of_sweep(config)
    return _run(config)


def _of_sweep(config: DictConfig) -> float | None:
    """A run among others: begun, gone on with or left out, as its folder says; a failure stops none."""
    folder = Path(config.run_dir).absolute()
    if (folder / STRATEGY_FILE).exists() and not config.dry_run:
        print(f"{folder.name}: finished already")
        return None
    sweep.forgive(folder)
    if (folder / JOURNAL).exists() and (folder / CONFIG_FILE).exists():
        config.resume = str(folder)
    try:
        return _run(config)
    except UserError as error:
        print(f"error: {folder.name}: {error}", file=sys.stderr)
        FAILURES.add(folder, str(error))
        return None


def _run(config: DictConfig) -> float | None:
    config, folder = _resumed(config) if config.resume else _fresh(config)
    reporter = ConsoleReporter(progress=config.progress) if rank() == 0 else Reporter()
    with reporter.stoppable():
        try:
            return search(config, folder, reporter)
        except Interrupted:
            if not config.dry_run:
                word = shlex.quote(cli.assignment("resume", folder))
                reporter.say(f"to go on: python -m dqss.search {word}")
            raise


def search(config: DictConfig, folder: Path, reporter: Reporter) -> float | None:
    """Run the search that ``config`` describes in ``folder``."""
    torch.set_num_threads(config.threads)
    loaded: LoadedModel = cli.make(config.model, "model")
    data = cli.make(config.data, "data")
    data.configure(loaded.input, loaded.num_classes)
    space = cli.make(config.search_space, "search_space")
    settings = _with_budget(settings_of(config.method), budget_of(config))
    space = _for_target(space, config.get("target"), settings, reporter)
    samples = data.calibration()
    reporter.say(f"{loaded.source} {loaded.name}; {data.summary()}")
    training = TrainingData.of(data.train_dataloader()) if isinstance(settings, QATSettings) else None
    if config.dry_run:
        if isinstance(settings, QATSettings):
            assert training is not None
            print_qat_plan(Console(), loaded.module, samples, training, space, settings, config.seed)
        else:
            print_plan(Console(), loaded.module, samples, space, settings, config.seed)
        return None
    loader = data.val_dataloader()
    name, metric = data.metric()
    with _logger(config) as logger:
        common: dict[str, Any] = {
            "validation": Validation(loader if loader is not None else (), metric, name),
            "run_dir": folder,
            "seed": config.seed,
            "info": _model_info(loaded, config),
            "reporter": reporter,
            "trainer": OmegaConf.to_container(config.trainer, resolve=True),
            "logger": logger,
        }
        result: SearchResult | QATResult
        if isinstance(settings, QATSettings):
            result = search_qat(loaded.module, training, samples, space, settings, **common)
        else:
            shown = config.report_images
            result = search_ptq(loaded.module, samples, space, settings, **common, report_images=shown)
        if logger and rank() == 0:
            track_result(logger, result, folder)
    if rank() == 0:
        print_result(Console(), result, folder)
    return _objective(result)


def _for_target(
    space: SearchSpace, name: str | None, settings: PTQSettings | QATSettings, reporter: Reporter
) -> SearchSpace:
    """The search space with the points that a target needs, checked."""
    if name is None:
        return space
    target = target_named(name)
    if isinstance(settings, PTQSettings):
        return target.adapt(space)
    target.check_space(space)
    if target.points is not None:
        reporter.say(f"target={name}: method=qat quantizes the inputs of layers only; sums stay in float")
    return space


def _fresh(config: DictConfig) -> tuple[DictConfig, Path]:
    _check_shared_folder(config)
    folder = ensure_folder(config.run_dir).absolute()
    _refuse_occupied(folder)
    config.run_dir = str(folder)
    _group_sweep(config)
    OmegaConf.resolve(config)
    cli.check_options(
        config,
        {**OPTIONS, **LATER_OPTIONS},
        (*GROUPS, BUDGET, "trainer", "logger", "resume", "experiment"),
    )
    if not 0 <= config.seed < 2**32 or (config.threads is not None and config.threads < 1):
        raise UserError(
            f"seed={config.seed} threads={config.threads}: expected 0 or more, and 1 or more or null"
        )
    # A resumed run and an evaluation need the same, or bits differ.
    config.threads = config.threads or torch.get_num_threads()
    for group in (config.model, config.data, config.get(BUDGET)):
        if group:
            cli.anchor(group)
    if not config.dry_run and rank() == 0:
        write_text_atomic(folder / CONFIG_FILE, OmegaConf.to_yaml(config))
    return config, folder


def _check_shared_folder(config: DictConfig) -> None:
    """Several processes write into one folder, and none starts the others."""
    if world_size() > 1:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise UserError("--multirun would be run by every process of torchrun: sweep without torchrun")
        said = [found.key_or_group for found in cli.overrides(HydraConfig.get().overrides.hydra)]
        if "hydra.run.dir" not in said:
            raise UserError("torchrun: give run_dir=FOLDER, so that all processes mean the same one")


def _refuse_occupied(folder: Path) -> None:
    if rank():
        return  # the first process may have begun to write there
    if (folder / STRATEGY_FILE).exists():
        raise OutputError(f"{folder} holds a finished search: choose another output folder")
    if (folder / JOURNAL).exists():
        word = shlex.quote(cli.assignment("resume", folder))
        raise OutputError(f"{folder} holds an interrupted search: go on with {word}, or choose another")


def _resumed(config: DictConfig) -> tuple[DictConfig, Path]:
    """The interrupted run's configuration, with what may be said anew."""
    folder = Path(config.resume).absolute()
    stored = cli.stored_config(folder, "resume", [*OPTIONS, *GROUPS])
    said = [found.key_or_group for found in cli.overrides(HydraConfig.get().overrides.task)]
    for key in FREE_OPTIONS:
        if key in said or key not in stored:
            stored[key] = config[key]
    if any(key == "logger" or key.startswith("logger.") for key in said):
        stored.logger = config.logger
    for key in FREE_OF_METHOD:
        if f"method.{key}" in said:
            stored.method[key] = config.method[key]
    # The folder may have moved since.
    moved, stored.run_dir = stored.run_dir, str(folder)
    if stored.logger and stored.logger.get("save_dir") in (moved, config.run_dir):
        stored.logger.save_dir = str(folder)
    for left_over in (*folder.glob(".dqss-*.tmp"), *folder.glob("checkpoints/.dqss-*.tmp")):
        left_over.unlink(missing_ok=True)
    return stored, folder


def place_run(arguments: list[str]) -> list[str]:
    """See :func:`dqss.cli.place_run`."""
    return cli.place_run(arguments, _refuse_occupied, _check_resume)


def _check_resume(arguments: list[str], folder: Path) -> None:
    if cli.is_multirun(arguments):
        raise UserError("resume= goes on with one search: leave out --multirun")
    cli.stored_config(folder, "resume", ["method"])
    if (folder / STRATEGY_FILE).exists():
        raise UserError(f"resume={folder}: this search is finished, its strategy is in {STRATEGY_FILE}")
    _refuse_other_search(arguments, folder)


def _refuse_other_search(arguments: list[str], folder: Path) -> None:
    """What the interrupted command said may be said again, and what does not matter; nothing else."""
    record = folder / ".hydra" / "overrides.yaml"
    before = set(OmegaConf.load(record)) if record.is_file() else set()
    for found in cli.overrides(arguments):
        key, word = found.key_or_group, str(found.input_line)
        free = any(key == name or key.startswith(f"{name}.") for name in FREE)
        same_place = key == "run_dir" and Path(str(found.value())).absolute() == folder.absolute()
        if not (free or same_place or word in before):
            raise UserError(
                f"resume={folder} goes on with that search as it was begun: leave out {word!r}, "
                "or start a new search without resume"
            )


@contextmanager
def _logger(config: DictConfig) -> Iterator[Any]:
    """The logger of the configuration, opened at once, and closed whatever happens."""
    if not config.logger:
        yield False
        return
    logger = cli.make(config.logger, "logger")
    try:
        with quiet_lightning():
            experiment = logger.experiment
            track_config(logger, cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True)))
    except Exception as error:
        raise UserError(f"logger: {' '.join(str(error).split())}; logger=csv needs nothing") from error
    try:
        yield logger
    finally:
        # Weights & Biases would go on with the same run in the next job of a sweep.
        finish = getattr(experiment, "finish", None)
        if finish is not None:
            finish()


def _group_sweep(config: DictConfig) -> None:
    """The runs of one sweep belong together, unless the user says otherwise."""
    hydra = HydraConfig.get()
    if hydra.mode is RunMode.MULTIRUN and "group" in (config.logger or ()) and config.logger.group is None:
        config.logger.group = Path(hydra.sweep.dir).name


def settings_of(method: DictConfig) -> PTQSettings | QATSettings:
    """The method group; ``loss`` and ``distance`` may be short names."""
    method = method.copy()
    for key in ("loss", "distance"):
        cli.spell_out_loss(method, key)
    if isinstance(method.get("schedule"), str):
        raise UserError(
            f"method.schedule={method.schedule}: choose it as schedule@method.schedule={method.schedule}"
        )
    settings: PTQSettings | QATSettings = cli.make(method, "method")
    return settings


def _with_budget(settings: PTQSettings | QATSettings, budget: Budget | None) -> PTQSettings | QATSettings:
    if isinstance(settings, PTQSettings):
        return replace(settings, budget=budget)
    if budget is not None:
        raise BudgetError("budgets are for method=ptq: leave them out, or search with method=ptq")
    return settings


def budget_of(config: DictConfig) -> Budget | None:
    """The budget group; sizes as exported are those of the target, if there is one."""
    if not config.get(BUDGET):
        return None
    budget: Budget = cli.make(config[BUDGET], BUDGET)
    if config.get("target") is not None:
        budget = replace(budget, exported_widths=target_named(config.target).weight_widths)
    return budget if budget.given() else None


def _model_info(loaded: LoadedModel, config: DictConfig) -> ModelInfo:
    inputs: dict[str, Any] = {}
    if loaded.input is not None:
        inputs["image"] = {"size": list(loaded.input.size), "crop_pct": loaded.input.crop_pct}
    inputs["config"] = OmegaConf.to_container(config.model, resolve=True)
    return ModelInfo(
        source=loaded.source, name=loaded.name, weights_sha256="", tensors={}, prepare=[], input=inputs
    )


def _objective(result: SearchResult | QATResult) -> float:
    return float(result.metrics["searched"]["selection"]["distance"])


def _end_of_sweep() -> None:
    """A sweep with failures has failed, though it went on to its end."""
    if FAILURES.lines:
        print(f"error: {len(FAILURES.lines)} runs failed; the same command tries them again", file=sys.stderr)
        sys.exit(cli.BAD_INPUT)


if __name__ == "__main__":
    cli.run(main, place_run)
    _end_of_sweep()

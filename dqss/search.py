"""``python -m dqss.search``: find a quantization strategy for a trained network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from dqss import cli
from dqss.cli import CONFIG_FILE
from dqss.errors import OutputError, UserError, near_match
from dqss.io import ensure_folder, write_text_atomic
from dqss.lit.contenders import Validation
from dqss.lit.search import SearchResult, search_ptq
from dqss.lit.settings import PTQSettings
from dqss.lit.summary import print_plan, print_result
from dqss.metrics import task_metric
from dqss.models import LoadedModel
from dqss.progress import ConsoleReporter, Interrupted
from dqss.strategy import STRATEGY_FILE, ModelInfo

LOSSES = {
    "kl": "dqss.losses.KLDivergence",
    "mse": "dqss.losses.MeanSquaredError",
    "l1": "dqss.losses.MeanAbsoluteError",
    "task": "dqss.losses.TaskLoss",
}


@hydra.main(version_base="1.3", config_path="pkg://dqss.conf", config_name="search")
def main(config: DictConfig) -> float | None:
    """Compose, search, print; returns the searched distance on the selection part, for sweeps."""
    config, folder = _resumed(config) if config.resume else _fresh(config)
    reporter = ConsoleReporter()
    with reporter.stoppable():
        try:
            return search(config, folder, reporter)
        except Interrupted:
            reporter.say(f"to go on: python -m dqss.search resume={folder}")
            raise


def search(config: DictConfig, folder: Path, reporter: ConsoleReporter) -> float | None:
    """Run the search that ``config`` describes in ``folder``."""
    if config.threads:
        torch.set_num_threads(config.threads)
    loaded: LoadedModel = cli.make(config.model)
    data = cli.make(config.data)
    data.configure(loaded.input, loaded.num_classes)
    space = cli.make(config.search_space)
    settings = _settings(config.method)
    samples = data.calibration()
    reporter.say(f"{loaded.source} {loaded.name}; {data.summary()}")
    if config.dry_run:
        print_plan(Console(), loaded.module, samples, space, settings, config.seed)
        return None
    loader = data.val_dataloader()
    name, metric = task_metric(data.task, loaded.num_classes)
    result = search_ptq(
        loaded.module,
        samples,
        space,
        settings,
        validation=Validation(loader if loader is not None else (), metric, name),
        run_dir=folder,
        seed=config.seed,
        info=_model_info(loaded, config),
        reporter=reporter,
        trainer=OmegaConf.to_container(config.trainer, resolve=True),  # type: ignore[arg-type]
        logger=cli.make(config.logger) if config.logger else False,
    )
    print_result(Console(), result, folder)
    return _objective(result)


def _fresh(config: DictConfig) -> tuple[DictConfig, Path]:
    folder = ensure_folder(config.run_dir)
    OmegaConf.resolve(config)
    if not config.dry_run:
        write_text_atomic(folder / CONFIG_FILE, OmegaConf.to_yaml(config))
    return config, folder


def _resumed(config: DictConfig) -> tuple[DictConfig, Path]:
    folder = Path(config.resume)
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"resume={folder}: no {CONFIG_FILE} there; give the folder of an interrupted run")
    if (folder / STRATEGY_FILE).exists():
        raise UserError(f"resume={folder}: this search is finished, its strategy is in {STRATEGY_FILE}")
    stored = OmegaConf.load(file)
    if not isinstance(stored, DictConfig):
        raise OutputError(f"{file}: damaged; start the search again")
    return stored, folder


def _settings(method: DictConfig) -> PTQSettings:
    """The method group; ``loss`` and ``distance`` may be short names."""
    method = method.copy()
    for key in ("loss", "distance"):
        value = method.get(key)
        if isinstance(value, str):
            if value not in LOSSES:
                raise UserError(
                    f"method.{key}={value}{near_match(value, LOSSES)}: expected one of {', '.join(LOSSES)}"
                )
            method[key] = {"_target_": LOSSES[value]}
    settings: PTQSettings = cli.make(method)
    return settings


def _model_info(loaded: LoadedModel, config: DictConfig) -> ModelInfo:
    inputs: dict[str, Any] = {}
    if loaded.input is not None:
        inputs["image"] = {"size": list(loaded.input.size), "crop_pct": loaded.input.crop_pct}
    inputs["config"] = OmegaConf.to_container(config.model, resolve=True)
    return ModelInfo(
        source=loaded.source, name=loaded.name, weights_sha256="", tensors={}, prepare=[], input=inputs
    )


def _objective(result: SearchResult) -> float:
    return float(result.metrics["searched"]["selection"]["distance"])


if __name__ == "__main__":
    cli.run(main)

"""``python -m dqss.evaluate``: measure the quantized network of a finished search again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from dqss import cli
from dqss.apply import apply_strategy
from dqss.bundle import load
from dqss.calls import call_model
from dqss.cli import CONFIG_FILE
from dqss.errors import DataError, StrategyError
from dqss.io import write_json_atomic
from dqss.losses import default_distance
from dqss.metrics import task_metric
from dqss.models import LoadedModel


@hydra.main(version_base="1.3", config_path="pkg://dqss.conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    """Rebuild the network from its strategy and measure it; needs no calibration data."""
    folder = Path(config.strategy)
    stored = _stored(folder)
    if config.threads:
        torch.set_num_threads(config.threads)
    bundle = load(folder)
    loaded: LoadedModel = cli.make(_merged(stored.model, config.model))
    data = cli.make(_merged(stored.data, config.data))
    data.configure(loaded.input, loaded.num_classes)
    loader = data.val_dataloader()
    if loader is None:
        raise DataError("there is no validation data; give data.validation_dir=FOLDER")
    quantized = apply_strategy(loaded.module, bundle, force=config.force)
    name, metric = task_metric(data.task, loaded.num_classes)
    rows = compare(loaded.module, quantized, loader, metric, name)
    for row, values in rows.items():
        cells = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        Console(highlight=False).print(f"{row:<10}{cells}", soft_wrap=True)
    write_json_atomic(Path(config.run_dir) / "metrics.json", rows)


@torch.no_grad()
def compare(
    original: nn.Module, quantized: nn.Module, loader: Any, metric: Any, metric_name: str
) -> dict[str, dict[str, float]]:
    """Task metric of both networks, and the distance between them, over ``loader``."""
    metrics = {"float": metric(), "quantized": metric()} if metric else {}
    total, count, labelled, distance = 0.0, 0, False, None
    for inputs, targets in loader:
        outputs = {"float": call_model(original, inputs), "quantized": call_model(quantized, inputs)}
        distance = distance or default_distance(outputs["float"])
        total += float(distance.per_sample(outputs["quantized"], outputs["float"]).double().sum())
        count += len(outputs["float"])
        if targets is not None:
            labelled = True
            for row, meter in metrics.items():
                meter.update(outputs[row], targets)
    assert distance is not None
    rows: dict[str, dict[str, float]] = {"float": {}, "quantized": {distance.name: total / count}}
    for row, meter in metrics.items():
        if labelled:
            rows[row][metric_name] = float(meter.compute())
        rows[row]["count"] = count
    return rows


def _stored(folder: Path) -> DictConfig:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise StrategyError(
            f"strategy={folder}: no {CONFIG_FILE} there; give the folder of a finished search"
        )
    stored = OmegaConf.load(file)
    assert isinstance(stored, DictConfig)
    return stored


def _merged(stored: DictConfig, changes: DictConfig) -> DictConfig:
    merged = OmegaConf.merge(stored, changes)
    assert isinstance(merged, DictConfig)
    return merged


if __name__ == "__main__":
    cli.run(main)

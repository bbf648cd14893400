"""``python -m dqss.evaluate``: measure the quantized network of a finished search again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor, nn

from dqss import cli
from dqss.apply import apply_strategy
from dqss.arithmetic import FAKE_QUANTIZED, Arithmetic, IntegerKernels
from dqss.bundle import Bundle, load
from dqss.calls import call_model
from dqss.deploy.targets import target_named
from dqss.errors import DataError, UserError
from dqss.io import ensure_folder, write_json_atomic
from dqss.lit.summary import print_rows
from dqss.losses import Distance, default_distance
from dqss.measure import count_of
from dqss.prepare import prepare
from dqss.progress import ConsoleReporter
from dqss.signature import example_inputs

OPTIONS = {
    "strategy": str,
    "target": str | None,
    "threads": int | None,
    "force": bool,
    "progress": str,
    "run_dir": str,
}
ROWS = ("float", "searched")


@cli.command("evaluate")
def main(config: DictConfig) -> None:
    """Rebuild the network from its strategy and measure it; needs no calibration data."""
    cli.check_options(config, OPTIONS, cli.OPEN_GROUPS)
    folder = Path(config.strategy)
    folder = folder.parent if folder.is_file() else folder
    bundle = load(folder)
    stored = cli.stored_config(folder, "strategy", ["model", "data", "method", "threads"])
    loaded, data, _ = cli.model_and_data(config, stored)
    loader = data.val_dataloader()
    if loader is None:
        raise DataError("there is no validation data; give data.validation_dir=FOLDER")
    arithmetic = _arithmetic(config.target, bundle)
    quantized = apply_strategy(loaded.module, bundle, force=config.force, arithmetic=arithmetic)
    name, metric = data.metric()
    reference, distance = _float(loaded.module, bundle), _distance(stored.method)
    reporter = ConsoleReporter(progress=config.progress)
    with reporter.stage("evaluate", count_of(loader)) as stage:
        rows = measure(reference, quantized, loader, distance, metric, name, stage.advance)
    print_rows(Console(), rows, ROWS, "validation")
    write_json_atomic(ensure_folder(config.run_dir) / "metrics.json", rows)


@torch.no_grad()
def measure(
    reference: nn.Module,
    quantized: nn.Module,
    loader: Iterable[tuple[Any, Tensor | None]],
    distance: Distance | None,
    metric: Any,
    metric_name: str,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Both networks over ``loader``: the rows of a search's ``metrics.json``, to the same bits.

    Args:
        reference: the prepared float network.
        quantized: what is measured.
        loader: ``(inputs, targets)``; targets may be None.
        distance: to the reference; None for the default one of its outputs.
        metric: makes a task metric, or None.
        metric_name: what it is called.
        advance: told of each batch's images.
    """
    models = dict(zip(ROWS, (reference, quantized), strict=True))
    totals, meters = dict.fromkeys(ROWS, 0.0), {row: metric() for row in ROWS} if metric else {}
    count, labelled = 0, False
    for inputs, targets in loader:
        outputs = {row: call_model(model, inputs) for row, model in models.items()}
        distance = distance or default_distance(outputs["float"])
        wanted = distance.read(outputs["float"]).float()
        for row, output in outputs.items():
            read = distance.read(output).float()
            totals[row] += float(distance.per_sample(read, wanted).double().sum())
            if targets is not None and meters:
                meters[row].update(read, targets)
                labelled = True
        count += len(wanted)
        advance(len(wanted))
    if distance is None:
        raise DataError("there is no validation data")
    measured: dict[str, Any] = {}
    for row in ROWS:
        values: dict[str, float] = {"distance": totals[row] / count, "count": count}
        if labelled:
            values[metric_name] = float(meters[row].compute())
        measured[row] = {"name": row, "validation": values}
    return {**measured, "distance": distance.name}


def _float(model: nn.Module, bundle: Bundle) -> nn.Module:
    """The prepared network, which the search's distances were taken to."""
    signature = cast("dict[str, Any]", bundle.strategy.model.input.get("signature", {}))
    return prepare(model, example_inputs(signature), recipe=bundle.strategy.model.prepare).model


def _arithmetic(target: str | None, bundle: Bundle) -> Arithmetic:
    """What a target computes with; by default what the search looked at."""
    if target is None:
        return FAKE_QUANTIZED
    known = target_named(target)
    known.check_strategy(bundle.strategy)
    if isinstance(known.arithmetic, IntegerKernels) and not bundle.strategy.points:
        raise UserError(
            f"target={target}: the strategy has no points, so that hardly anything would be computed as "
            f"there; search with target={target}"
        )
    return known.arithmetic


def _distance(method: DictConfig) -> Distance | None:
    cli.spell_out_loss(method, "distance")
    return None if method.distance is None else cli.make(method.distance, "method.distance")


if __name__ == "__main__":
    cli.run(main, cli.open_groups)

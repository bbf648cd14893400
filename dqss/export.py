"""``python -m dqss.export``: the quantized network of a finished search as a file for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dqss import cli
from dqss.bundle import load
from dqss.data.base import CalibrationDataModule
from dqss.deploy.export import export_model
from dqss.deploy.program import ProgramReport, export_program
from dqss.deploy.targets import GENERIC, target_named
from dqss.errors import UserError
from dqss.io import ensure_folder, write_json_atomic
from dqss.metrics import as_read
from dqss.progress import ConsoleReporter
from dqss.samples import Samples

if TYPE_CHECKING:
    from dqss.deploy.report import ExportReport

OPTIONS = {
    "strategy": str,
    "format": str,
    "target": str,
    "exact": bool | None,
    "file": str | None,
    "images": int | None,
    "debug": bool,
    "dynamic_size": bool | None,
    "threads": int | None,
    "force": bool,
    "progress": str,
    "run_dir": str,
}
FORMATS = {"onnx": "model.onnx", "torch": "model.pt2"}
"""With the name that a file has by default."""


@cli.command("export")
def main(config: DictConfig) -> None:
    """Rebuild the network from its strategy, write it for a runtime and say how it compares."""
    cli.check_options(config, OPTIONS, (*cli.OPEN_GROUPS, "tolerance"))
    if config.format not in FORMATS:
        raise UserError(f"format={config.format}: expected one of {', '.join(FORMATS)}")
    if config.format == "torch" and config.target != GENERIC.name:
        raise UserError(f"format=torch runs in torch: target={config.target} is for format=onnx")
    if config.images is not None and config.images < 1:
        raise UserError(f"images={config.images}: expected 1 or more, or null")
    target = target_named(config.target).in_form(config.exact)
    tolerance = cli.make(config.tolerance, "tolerance")
    folder = Path(config.strategy)
    folder = folder.parent if folder.is_file() else folder
    bundle = load(folder)
    target.check_strategy(bundle.strategy)
    stored = cli.stored_config(folder, "strategy", ["model", "data", "threads"])
    loaded, data, threads = cli.model_and_data(config, stored)
    name, metric = data.metric()
    console = Console(highlight=False, soft_wrap=True)
    place = ensure_folder(config.run_dir)
    path = Path(config.file) if config.file else place / FORMATS[config.format]
    options: dict[str, Any] = {
        "dynamic_size": config.dynamic_size,
        "tolerance": tolerance,
        "metric": metric,
        "watch": (lambda parity: _print_parts(console, parity)) if config.debug else None,
        "force": config.force,
        "reporter": ConsoleReporter(progress=config.progress),
    }
    inputs = _inputs(data, config.images)
    report: ExportReport | ProgramReport
    if config.format == "torch":
        report = export_program(loaded.module, bundle, path, inputs, **options)
    else:
        report = export_model(loaded.module, bundle, path, inputs, target=target, threads=threads, **options)
    write_json_atomic(place / "export.json", report.summary())
    for line in report.lines():
        console.print(escape(line))
    for kind, value in report.metric.items():
        console.print(f"{kind:<13}{as_read(name, value)}")
    kind = "torch" if isinstance(report, ProgramReport) else report.target
    console.print(escape(f"{kind} model in {report.path}"))


def _inputs(data: CalibrationDataModule, limit: int | None) -> Samples:
    """What the file is compared on: validation data, or the calibration data where there is none."""
    loader = data.val_dataloader()
    if loader is None:
        samples = data.calibration()
        return samples.subset(range(min(len(samples), limit or len(samples))))
    batches, count = [], 0
    for batch in loader:
        batches.append(batch)
        count += len(batch[0])
        if limit is not None and count >= limit:
            break
    if all(isinstance(targets, torch.Tensor) for _, targets in batches):
        return Samples.of(batches, labelled=True, limit=limit)
    return Samples.of([inputs for inputs, _ in batches], limit=limit)


def _print_parts(console: Console, parity: Any) -> None:
    table = Table("part", "values", "differ", "by up to", box=None, pad_edge=False)
    for row in parity.parts:
        unit = "steps" if row.part.call is not None else "of the output"
        table.add_row(escape(str(row.part)), str(row.count), f"{row.share:.3%}", f"{row.largest:.3g} {unit}")
    console.print(table)


if __name__ == "__main__":
    cli.run(main, cli.open_groups)

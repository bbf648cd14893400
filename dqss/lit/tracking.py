"""What experiment trackers get of a search beside its losses: configuration, heat-maps, strategy.

The course of a search is logged row by row, as it goes, to whatever logger there is; here is what
comes before and after.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from dqss.bundle import TENSORS_FILE
from dqss.lit.qat_search import QATResult
from dqss.lit.search import SearchResult
from dqss.report import REPORT_FILE
from dqss.strategy import STRATEGY_FILE

FILES = (STRATEGY_FILE, TENSORS_FILE, "metrics.json", REPORT_FILE)
"""Of the run folder, what goes into an artifact."""
Found = SearchResult | QATResult
CELL = (8, 16)
"""Pixels of a row and of a column of a heat-map without words."""
COLUMNS = ("layer", "tensor", "choice", "bits", "probability", "margin")


def track_config(logger: Logger, config: Mapping[str, Any]) -> None:
    """Hand over the configuration; to be called before the first step.

    A CSV logger would keep it in a second file beside the run folder's own.
    """
    if not isinstance(logger, CSVLogger):
        logger.log_hyperparams(dict(config))


def track_result(logger: Logger, result: Found, folder: Path) -> None:
    """Hand over what a finished search found.

    Args:
        logger: CSV loggers get nothing more: the run folder has it.
        result: of the search.
        folder: where its files are.
    """
    if isinstance(logger, WandbLogger):
        _to_wandb(logger, result, folder)
    elif isinstance(logger, TensorBoardLogger):
        _to_tensorboard(logger, result)


def final_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The rows of ``metrics.json`` as flat names: ``final/searched/validation/kl``."""
    found = {}
    for row in ("float", "best_uniform", "argmax", "refined", "searched", "soft"):
        for part in ("selection", "validation"):
            measured = (metrics.get(row) or {}).get(part) or {}
            for key, value in measured.items():
                name = metrics["distance"] if key == "distance" else key
                found[f"final/{row}/{part}/{name}"] = float(value)
    return found


def choices(result: Found) -> list[list[Any]]:
    """A row of :data:`COLUMNS` for each tensor."""
    return [
        [layer, role, choice.candidate().title, choice.bits, choice.probability, choice.margin]
        for layer, role, choice in result.bundle.strategy.choices()
    ]


def heat_maps(result: Found) -> Iterator[tuple[str, list[str], list[str], NDArray[np.float32]]]:
    """Probabilities of all options, for weights and for activations with operands of products.

    Yields:
        Name, decisions, options, and the probabilities ``[decisions, options]``; NaN where a decision
        has no such option.
    """
    names: dict[str, dict[str, None]] = {"weights": {}, "activations": {}}
    for _, role, choice in result.bundle.strategy.choices():
        names["weights" if role == "weight" else "activations"][choice.decision] = None
    for kind, found in names.items():
        decisions = [result.supernet.decisions[name] for name in found]
        titles = [[getattr(option, "title", str(option)) for option in d.options] for d in decisions]
        columns = list(dict.fromkeys(title for row in titles for title in row))
        values = np.full((len(decisions), len(columns)), np.nan, np.float32)
        for row, (decision, own) in enumerate(zip(decisions, titles, strict=True)):
            values[row, [columns.index(title) for title in own]] = decision.probabilities()
        if decisions:
            yield kind, list(found), columns, values


def as_picture(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """``[H, W, 3]``: white at 0, dark blue at 1, grey where there is none."""
    full, none = np.array([8, 70, 139.0]), np.array([200.0, 200.0, 200.0])
    share = np.nan_to_num(values)[..., None]
    colours = np.where(np.isnan(values)[..., None], none, 255 + share * (full - 255))
    cells: NDArray[np.uint8] = colours.round().astype(np.uint8)
    return cells.repeat(CELL[0], axis=0).repeat(CELL[1], axis=1)


def _to_wandb(logger: WandbLogger, result: Found, folder: Path) -> None:
    import wandb
    from plotly import graph_objects

    run = logger.experiment
    shown: dict[str, Any] = {"strategy/choices": wandb.Table(columns=list(COLUMNS), data=choices(result))}
    for kind, rows, columns, values in heat_maps(result):
        heat = graph_objects.Heatmap(z=values, x=columns, y=rows, zmin=0, zmax=1, colorscale="Cividis")
        figure = graph_objects.Figure(heat).update_yaxes(autorange="reversed")
        shown[f"strategy/{kind}"] = wandb.Plotly(figure)
    run.log({**final_numbers(result.metrics), **shown})
    artifact = wandb.Artifact(f"strategy-{run.id}", type="strategy", metadata=_metadata(result))
    for name in FILES:
        artifact.add_file(str(folder / name))
    run.log_artifact(artifact)


def _to_tensorboard(logger: TensorBoardLogger, result: Found) -> None:
    steps = len(result.history)
    logger.log_metrics(final_numbers(result.metrics), step=steps)
    # Indented text is shown as it is: no name becomes markup.
    rows = [f"    {layer} {role}: {title}, p {p}" for layer, role, title, _, p, _ in choices(result)]
    logger.experiment.add_text("strategy/choices", "\n".join(rows), steps)
    for kind, _, _, values in heat_maps(result):
        logger.experiment.add_image(f"strategy/{kind}", as_picture(values), steps, dataformats="HWC")


def _metadata(result: Found) -> dict[str, Any]:
    strategy = result.bundle.strategy
    return {
        "model": f"{strategy.model.source} {strategy.model.name}",
        "search_space": strategy.search_space,
        "seed": strategy.seed,
        "dqss": strategy.dqss,
    }

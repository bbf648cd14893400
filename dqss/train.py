"""``python -m dqss.train``: train a network and write its weights as safetensors."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict
from safetensors.torch import save
from torch import nn

from dqss import cli
from dqss.cli import CONFIG_FILE
from dqss.errors import OutputError, UserError
from dqss.io import ensure_folder, write_bytes_atomic, write_text_atomic
from dqss.lit.recipe import Recipe, TrainingRun
from dqss.lit.running import CHECKPOINTS
from dqss.progress import ConsoleReporter, Interrupted, Reporter

GROUPS = ("model", "data", "recipe")
OPTIONS = {
    "seed": int,
    "threads": int | None,
    "progress": str,
    "output": str | None,
    "resume": str | None,
}
WEIGHTS = "weights.safetensors"


@cli.command("train")
def main(config: DictConfig) -> float:
    """Train as the configuration says; returns what was reached on the validation data."""
    config, folder = _resumed(config) if config.resume else _fresh(config)
    reporter = ConsoleReporter(progress=config.progress)
    with reporter.stoppable():
        try:
            return train(config, folder, reporter)
        except Interrupted:
            if (folder / CHECKPOINTS).exists():
                word = shlex.quote(cli.assignment("resume", folder))
                reporter.say(f"to go on: python -m dqss.train {word}")
            raise


def train(config: DictConfig, folder: Path, reporter: Reporter | None = None) -> float:
    """Build, fit, save; returns the validation score: accuracy in 0..1, or PSNR in dB.

    Raises:
        DataError: if the data group has no training part for this recipe.
        OutputError: if the weights cannot be written.
    """
    reporter = reporter or Reporter()
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    recipe: Recipe = cli.make(config.recipe, "recipe")
    _forget_pretrained(config.model)
    loaded, data = cli.make(config.model, "model"), cli.make(config.data, "data")
    recipe.check(data)
    data.configure(loaded.input, loaded.num_classes)
    reporter.say(f"{loaded.source} {loaded.name}; {data.summary()}")
    output = Path(config.output or folder / WEIGHTS)
    ensure_folder(output.parent)
    trainer = OmegaConf.to_container(config.trainer, resolve=True)
    assert isinstance(trainer, dict)
    run = TrainingRun(ensure_folder(folder), config.seed, {str(k): v for k, v in trainer.items()}, reporter)
    trained = recipe.train(loaded.module, data, run)
    write_bytes_atomic(output, _weights(trained.module))
    print(f"{trained.words}, weights in {output}")
    return trained.score


def _fresh(config: DictConfig) -> tuple[DictConfig, Path]:
    folder = ensure_folder(config.run_dir).absolute()
    _refuse_occupied(folder)
    config.run_dir = str(folder)
    OmegaConf.resolve(config)
    cli.check_options(config, OPTIONS, (*GROUPS, "trainer", "run_dir", "experiment"))
    for group in (config.model, config.data):
        cli.anchor(group)
    write_text_atomic(folder / CONFIG_FILE, OmegaConf.to_yaml(config))
    return config, folder


def _resumed(config: DictConfig) -> tuple[DictConfig, Path]:
    """The interrupted training's configuration; progress alone may be said anew."""
    folder = Path(config.resume).absolute()
    stored = cli.stored_config(folder, "resume", [*GROUPS, *OPTIONS])
    stored.progress = config.progress
    return stored, folder


def _refuse_occupied(folder: Path) -> None:
    if (folder / WEIGHTS).exists():
        raise OutputError(f"{folder} holds a finished training: choose another output folder")
    if (folder / CHECKPOINTS).exists():
        word = shlex.quote(cli.assignment("resume", folder))
        raise OutputError(f"{folder} holds an interrupted training: go on with {word}, or choose another")


def place_run(arguments: list[str]) -> list[str]:
    """See :func:`dqss.cli.place_run`."""
    return cli.place_run(arguments, _refuse_occupied, _check_resume)


def _check_resume(arguments: list[str], folder: Path) -> None:
    cli.stored_config(folder, "resume", [*GROUPS])
    if (folder / WEIGHTS).exists():
        raise UserError(f"resume={folder}: this training is finished, its weights are in {WEIGHTS}")
    for found in cli.overrides(arguments):
        if found.key_or_group not in ("resume", "progress", "hydra"):
            raise UserError(
                f"resume={folder} goes on with that training as it was begun: leave out "
                f"{found.input_line!r}, or start a new one without resume"
            )


def _forget_pretrained(model: DictConfig) -> None:
    """``model.pretrained=false`` is said to all groups; some have no weights to leave out."""
    try:
        parameters = inspect.signature(get_object(model._target_)).parameters
    except Exception:  # what is wrong with it is said where it is made
        return
    if "pretrained" in model and not model.pretrained and "pretrained" not in parameters:
        with open_dict(model):
            del model["pretrained"]


def _weights(module: nn.Module) -> bytes:
    """The floating-point state as a safetensors file."""
    state = {key: value for key, value in module.state_dict().items() if value.is_floating_point()}
    return save({key: value.detach().cpu().contiguous() for key, value in state.items()})


if __name__ == "__main__":
    cli.run(main, place_run)

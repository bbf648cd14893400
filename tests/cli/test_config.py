"""Every configuration composes, and every option of every group makes what its name says."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from dqss import cli
from dqss.data.base import CalibrationDataModule
from dqss.lit.qat_settings import QATSettings
from dqss.lit.recipe import Recipe
from dqss.lit.schedules import Schedule
from dqss.lit.settings import PTQSettings
from dqss.lit.super_resolution_recipe import SuperResolutionRecipe
from dqss.lit.train import ClassifierRecipe
from dqss.models import LoadedModel
from dqss.repair import RepairSettings
from dqss.search import settings_of
from dqss.space import SearchSpace

CONF = Path(__file__).resolve().parents[2] / "conf"
NEEDED = {
    ("model", "own"): ["model.target=torch.nn:Linear", "+model.kwargs={in_features:3,out_features:2}"],
    ("data", "imagefolder"): ["data.calibration_dir=."],
    ("data", "pictures"): ["data.calibration_dir=."],
    ("logger", "wandb"): ["logger.offline=true"],
}
KINDS = {
    "model": LoadedModel,
    "data": CalibrationDataModule,
    "search_space": SearchSpace,
    "recipe": Recipe,
}
TRAINING = {"rlfn_x2"}
"""Experiments for ``python -m dqss.train``."""
REPAIRS = {
    "none": None,
    "blocks": RepairSettings(),
    "layers": RepairSettings(blocks=(), drop=0.0, float_inputs=0.0),
}
METHODS = {"ptq": PTQSettings, "ptq_fast": PTQSettings, "qat": QATSettings, "bilevel": QATSettings}


def options(group: str) -> list[str]:
    return sorted(
        file.relative_to(CONF / group).with_suffix("").as_posix() for file in (CONF / group).rglob("*.yaml")
    )


def config(*words: str, name: str = "search") -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_module("dqss.conf", version_base="1.3"):
        return compose(name, overrides=["run_dir=/nowhere", *words])


GROUPS = [path.name for path in CONF.iterdir() if path.is_dir() and path.name != "experiment"]
CHOICES = [(group, option) for group in sorted(GROUPS) for option in options(group)]


@pytest.mark.parametrize("name", options("experiment"))
def test_experiments_compose(name: str) -> None:
    found = config(f"+experiment={name}", name="train" if name in TRAINING else "search")
    assert not OmegaConf.missing_keys(found)
    cli.check_options(found, {}, found)


@pytest.mark.parametrize(("group", "option"), CHOICES)
def test_group_options_make_what_they_say(group: str, option: str) -> None:
    place = f"{group}@method.{group}" if group in ("schedule", "repair") else group
    command = "train" if group == "recipe" else "search"
    found = config(f"{place}={option}", *NEEDED.get((group, option), []), name=command)
    OmegaConf.resolve(found)
    if group in KINDS:
        assert isinstance(cli.make(found[group], group), KINDS[group])
    elif group in ("method", "schedule", "repair"):
        settings = settings_of(found.method)
        assert isinstance(settings, METHODS[option] if group == "method" else PTQSettings)
        assert isinstance(settings.schedule, Schedule)
        if group == "repair":
            assert isinstance(settings, PTQSettings) and settings.repair == REPAIRS[option]
    elif found[group] and "_target_" in found[group]:
        cli._check(OmegaConf.to_container(found[group]), group)


def test_the_settings_in_the_files_are_those_in_the_code() -> None:
    for option, kind in (("classifier", ClassifierRecipe), ("super_resolution", SuperResolutionRecipe)):
        assert cli.make(config(f"recipe={option}", name="train").recipe, "recipe") == kind()
    assert settings_of(config().method) == PTQSettings()
    assert settings_of(config("method=qat").method) == QATSettings()


@pytest.mark.parametrize("name", ["search", "evaluate", "train"])
def test_commands_describe_every_option(name: str) -> None:
    """Each line that sets something says what it is, or leads into a group."""
    text = (CONF / f"{name}.yaml").read_text().split("\nhydra:")[0]
    own = text.split("\n\n", 1)[1]
    for line in own.splitlines():
        if line and not line.startswith(" ") and not line.rstrip().endswith(":"):
            assert "#" in line, line

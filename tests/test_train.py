"""Training from the command line's configuration: learns, repeats itself, writes what it trained."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from safetensors.torch import load_file

from dqss.errors import DataError
from dqss.models.factory import digits_resnet20
from dqss.train import train

QUICK = ["recipe.epochs=2", "+trainer.enable_progress_bar=false", "recipe.learning_rate=0.05"]


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def config(*overrides: str) -> DictConfig:
    with initialize_config_module("dqss.conf", version_base="1.3"):
        return compose("train", overrides=[*QUICK, *overrides])


def test_two_epochs_learn_and_repeat_bit_for_bit(tmp_path: Path) -> None:
    accuracy = train(config(f"output={tmp_path}/new/one.safetensors"), tmp_path)
    assert accuracy > 0.5
    torch.randn(7)
    assert train(config(), tmp_path) == accuracy
    one, two = (load_file(tmp_path / name) for name in ("new/one.safetensors", "weights.safetensors"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    loaded = digits_resnet20(checkpoint=tmp_path / "weights.safetensors").module
    assert torch.equal(loaded.state_dict()["conv1.weight"], one["conv1.weight"])


def test_data_without_a_training_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="imagefolder has no training part for classifiers: use digits"):
        train(config("data=imagefolder", f"data.calibration_dir={tmp_path}"), tmp_path)

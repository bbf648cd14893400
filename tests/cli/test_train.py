"""``python -m dqss.train`` for pictures: what it leaves, going on after a kill, and bad input."""

import csv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dqss.models.super_resolution import photographs_rlfn
from tests.cli.runner import call, finish, spawn
from tests.support.pictures import write_picture

KILL = (
    "from dqss.lit.checkpoint import SafeKeeping as K; keep = K.on_train_batch_end\n"
    "def stop(self, trainer, *args):\n"
    "    keep(self, trainer, *args)\n"
    "    import os\n"
    "    if trainer.global_step == 3: os._exit(9)\n"
    "K.on_train_batch_end = stop"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(2):
        write_picture(folder / f"{number}.png", 40, 44 + number, seed=number)
    return folder


@pytest.fixture(scope="module")
def tiny(pictures: Path) -> tuple[str, ...]:
    """Five steps in two stages, in a few seconds."""
    return (
        "+experiment=rlfn_x2",
        "data=pictures",
        f"data.calibration_dir={pictures}",
        f"data.validation_dir={pictures}",
        "data.patch=15",
        "recipe.stages=[3,2]",
        "recipe.batch_size=2",
        "recipe.contrastive=[0,0.1]",
        "recipe.measure_every=2",
        "recipe.checkpoint_every=1",
    )


@pytest.fixture(scope="module")
def whole(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    outcome = call("train", *tiny, "run_dir=out", cwd=folder)
    assert outcome.code == 0, outcome.err
    assert "validation psnr" in outcome.out and "dB, bicubic" in outcome.out
    return folder / "out"


def test_weights_and_the_course_are_there(whole: Path) -> None:
    network = photographs_rlfn(checkpoint=whole / "weights.safetensors").module
    assert set(load_file(whole / "weights.safetensors")) == set(network.state_dict())
    with open(whole / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4", "5"] and all(float(row["psnr"]) > 0 for row in rows)


def test_resumed_after_a_kill_it_is_the_same(whole: Path, tiny: tuple[str, ...], tmp_path: Path) -> None:
    assert finish(spawn("train", *tiny, "run_dir=out", cwd=tmp_path, prelude=KILL)).code == 9
    assert "go on with resume=" in call("train", *tiny, "run_dir=out", cwd=tmp_path).error
    outcome = call("train", "resume=out", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    one, two = (load_file(folder / "weights.safetensors") for folder in (whole, tmp_path / "out"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (whole / "history.csv").read_text() == (tmp_path / "out" / "history.csv").read_text()


def test_finished_and_other_folders_are_refused(whole: Path, tiny: tuple[str, ...], tmp_path: Path) -> None:
    assert "holds a finished training" in call("train", *tiny, f"run_dir={whole}", cwd=tmp_path).error
    assert "this training is finished" in call("train", f"resume={whole}", cwd=tmp_path).error
    assert "no config.yaml there" in call("train", f"resume={tmp_path}", cwd=tmp_path).error


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["recipe.stages=[0]"], "recipe.stages=[0]"),
        (["recipe.stagse=[1]"], "stages"),
        (["recipe.learning_rate=fast"], "recipe.learning_rate"),
        (["data.patch=14"], "at least 15x15"),
        (["data.patch=200"], "too small for patches of 200"),
        (["sede=1"], "sede"),
        (["model._target_=dqss.nothing"], "_target_=dqss.nothing cannot be imported"),
        (["+trainer.devices=2"], "devices"),
    ],
)
def test_bad_input_is_one_line(words: list[str], fault: str, tiny: tuple[str, ...], tmp_path: Path) -> None:
    assert fault in call("train", *tiny, *words, cwd=tmp_path).error


def test_recipes_are_for_their_own_data(tmp_path: Path) -> None:
    words = ["recipe=super_resolution", "data=digits"]
    assert "digits has no pictures to enlarge" in call("train", *words, cwd=tmp_path).error
    assert (
        "photographs has no training part for classifiers"
        in call("train", "data=photographs", cwd=tmp_path).error
    )

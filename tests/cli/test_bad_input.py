"""Bad input is one line and exit code 2; nothing that was there before is lost."""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dqss.models.factory import digits_resnet20
from tests.cli.runner import TINY, call, finish, results, spawn


def refused(cwd: Path, *words: object) -> str:
    """The line with which a search is refused; it must leave no result behind."""
    error = call("search", *TINY, "run_dir=out", *words, cwd=cwd).error
    assert not (cwd / "out" / "strategy.json").exists()
    return error


# -- the configuration ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["search_space.weigth_bits=4"], "weigth_bits: unknown option (did you mean 'weight_bits'?)"),
        (["weight_bits=4"], "weight_bits: unknown option (did you mean 'search_space.weight_bits'?)"),
        (["+search_space.weigth_bits=4"], "weigth_bits: unknown option (did you mean 'weight_bits'?)"),
        (["model=tim"], "model=tim (did you mean 'timm'?): expected one of digits_resnet20, ditn"),
        (["+modle=timm"], "modle: unknown option (did you mean 'model'?)"),
        (["search_space.weight_bits=[4,8"], "search_space.weight_bits=[4,8"),
        (["method.steps=many"], "method.steps=many: expected a whole number"),
        (["method.steps=2.5"], "method.steps=2.5: expected a whole number"),
        (["method.steps=0"], "method.steps=0: expected a positive number"),
        (["method.parts=[0.8,0.8]"], "method.parts=[0.8, 0.8]: expected two positive shares"),
        (["method.parts=[0.5,0.3,0.2]"], "method.parts=[0.5, 0.3, 0.2]: expected a list of 2 numbers"),
        (["method.settle.margin=2"], "method.settle.margin=2: expected a number in 0..1, above 0"),
        (["method.settle.patience=0"], "method.settle.patience=0: expected 1 or more"),
        (["method.settle=true"], "method.settle=True: write method.settle.margin=0.9, or null there"),
        (["method.stop_after=0"], "method.stop_after=0: expected a positive number"),
        (["method.stop_after=soon"], "method.stop_after=soon: expected a whole number"),
        (["method.recompute=layer9"], "no module with layers under search inside matches 'layer9' (did you"),
        (["method.recompute=[]"], "method.recompute=[]: name modules"),
        (["method.recompute=2"], "method.recompute=2: expected a word or a list of words"),
        (["method.refine.screen=0"], "refine.screen=0: expected 1 or more"),
        (["method.loss=kll"], "method.loss=kll (did you mean 'kl'?): expected one of kl, mse, l1, luma"),
        (["method.schedule=softmax"], "schedule@method.schedule=softmax"),
        (["schedule@method.schedule=gumbel", "method.schedule.temperature=0"], "temperatures [0, 0.5]"),
        (["method.schedule.memory=0"], "schedule.memory=0: expected a share of the steps"),
        (["search_space.weight_bits=99"], "99: expected an integer from 2 to"),
        (["search_space.weight_bits=four"], "weight_bits=four: expected a whole number or a list of whole"),
        (["search_space.weight_algorithms=[msee]"], "(did you mean 'mse'?)"),
        (["search_space.weight_granularity=row"], "granularity"),
        (["search_space.skip=[conv9]"], "no layer matches 'conv9' (did you mean 'conv1'?)"),
        (["search_space.skip=['*']"], "matches none of the model's 20 layers"),
        (["search_space.skip_types=[Conv9d]"], "no layer is a 'Conv9d' (did you mean 'Conv2d'?)"),
        (["seed=x"], "seed=x: expected a whole number"),
        (["seed=-1"], "seed=-1"),
        (["threads=0"], "threads=0"),
        (["dry_run=maybe"], "dry_run=maybe: expected true or false"),
        (["data.calibration_images=few"], "data.calibration_images=few: expected a whole number"),
        (["data.calibration_images=1"], "1 calibration"),
        (["model=own"], "model.target is not given: add model.target=VALUE"),
        (["model=own", "model.kwargs.depth=3"], "model.kwargs.depth: nothing is set there yet; write a +"),
        (["model=own", "model.target=nowhere:net"], "nowhere cannot be imported"),
        (["model=timm", "model.name=mobilenetv2_10"], "timm has no model 'mobilenetv2_10' (did you mean"),
        (["trainer.accelerator=gpuu"], "trainer.accelerator=gpuu (did you mean 'gpu'?)"),
        (["+trainer.devices=2"], "torchrun --nproc_per_node=2"),
        (["+trainer.max_step=2"], "trainer: "),
        (["logger=csv", "+logger.colour=red"], "logger.colour: unknown option"),
    ],
)  # fmt: skip
def test_configuration(tmp_path: Path, words: list[str], expected: str) -> None:
    assert expected in refused(tmp_path, *words)


def test_unknown_experiment(tmp_path: Path) -> None:
    error = call("search", "+experiment=resnt_ptq", cwd=tmp_path).error
    assert "experiment=resnt_ptq (did you mean 'resnet_ptq'?): expected one of" in error
    assert "+experiment=resnet_ptq" in call("search", "experiment=resnet_ptq", cwd=tmp_path).error
    assert not list(tmp_path.iterdir())
    error = call("search", "+experimnt=resnet_ptq", "run_dir=out", cwd=tmp_path).error
    assert "experimnt: unknown option (did you mean 'experiment'?)" in error


def test_train_speaks_the_same_way(tmp_path: Path) -> None:
    words = ("data=imagefolder", "data.calibration_dir=x", "run_dir=out")
    assert "no training part" in call("train", *words, cwd=tmp_path).error


# -- images -----------------------------------------------------------------------------------


def write_images(folder: Path, count: int, value: int | None = None) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(count):
        pixels = random.integers(0, 256, (8, 8)) if value is None else np.full((8, 8), value)
        Image.fromarray(pixels.astype(np.uint8), "L").save(folder / f"{index:02}.png")


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "has no images in it"),
        (lambda folder: folder.write_text("x"), "is not a folder"),
    ],
    ids=["missing", "empty", "file"],
)
def test_folders(tmp_path: Path, prepare, expected: str) -> None:
    prepare(tmp_path / "images")
    error = refused(tmp_path, "data=imagefolder", "data.calibration_dir=images")
    assert "data.calibration_dir=images" in error or str(tmp_path / "images") in error
    assert expected in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 4)
    (tmp_path / "images").chmod(0)
    assert "Permission denied" in refused(tmp_path, "data=imagefolder", "data.calibration_dir=images")


def test_corrupt_images_are_named_and_skipped(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 12)
    (tmp_path / "images" / "03.png").write_bytes(b"no image")
    whole = (tmp_path / "images" / "07.png").read_bytes()
    (tmp_path / "images" / "07.png").write_bytes(whole[:40])
    words = ("data=imagefolder", "data.calibration_dir=images", "run_dir=out")
    outcome = call("search", *TINY, *words, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    said = outcome.out + outcome.err
    assert "03.png" in said and "07.png" in said and "05.png" not in said
    for file in (tmp_path / "images").iterdir():
        file.write_bytes(b"no image")
    error = call("search", *TINY, *words[:2], "run_dir=out2", cwd=tmp_path).error
    assert "none of 12 images is readable" in error


def test_constant_images_are_handled(tmp_path: Path) -> None:
    write_images(tmp_path / "black", 8, value=0)
    words = ("data=imagefolder", "data.calibration_dir=black", "run_dir=out")
    outcome = call("search", *TINY, *words, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert np.isfinite(results(tmp_path / "out")["metrics"]["searched"]["selection"]["distance"])


# -- checkpoints and networks -----------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_checkpoint_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pth")
    assert "not run" in refused(tmp_path, "model.checkpoint=bomb.pth")
    assert not (tmp_path / "exploded").exists()
    os.chdir(tmp_path)
    torch.load("bomb.pth", weights_only=False)
    assert (tmp_path / "exploded").exists(), "the bomb is none"


def test_checkpoint_with_other_keys_or_shapes(tmp_path: Path) -> None:
    state = digits_resnet20().module.state_dict()
    torch.save({f"other.{key}": value for key, value in state.items()}, tmp_path / "keys.pth")
    assert "does not fit" in refused(tmp_path, "model.checkpoint=keys.pth")
    torch.save({**state, "linear.bias": torch.zeros(7)}, tmp_path / "shapes.pth")
    error = refused(tmp_path, "model.checkpoint=shapes.pth")
    assert "linear.bias ([7] in the file, [10] in the model)" in error
    torch.save({**state, "layer1.0.conv2.weight": state["layer1.0.conv2.weight"] / 0}, tmp_path / "nan.pth")
    assert "'layer1.0.conv2.weight'" in refused(tmp_path, "model.checkpoint=nan.pth")


NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, factor=1.0, dead=False):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.last = nn.Linear(64, 10)
        self.factor = factor
        if dead:
            nn.init.zeros_(self.first.weight[1]); nn.init.zeros_(self.first.bias[:2])
            nn.init.constant_(self.second.weight[2], 0.5)

    def forward(self, x):
        x = self.second(self.first(x) * self.factor)
        return self.last(x.flatten(1))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Words that choose a network of the user's."""
    (tmp_path / "odd_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    yield ("model=own", "model.target=odd_nets:Net", "model.input={size:[1,8,8],mean:[0.5],std:[0.5]}")
    sys.modules.pop("odd_nets", None)


def test_non_finite_activations_name_the_layer(tmp_path: Path, own) -> None:
    assert "input of layer 'second'" in refused(tmp_path, *own, "+model.kwargs.factor=inf")


def test_dead_and_constant_channels_are_handled(tmp_path: Path, own) -> None:
    words = (*own, "+model.kwargs.dead=true", "run_dir=out")
    outcome = call("search", *TINY, *words, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    scales = results(tmp_path / "out")["tensors"]["first.weight.scale"]
    assert all(0 < scale < float("inf") for scale in scales)


# -- where results go -------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["run_dir", "hydra.run.dir"])
def test_output_folder_below_a_file(tmp_path: Path, key: str) -> None:
    (tmp_path / "file").write_text("mine")
    error = call("search", *TINY, f"{key}=file/below", cwd=tmp_path).error
    assert "is a file, not a folder" in error
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_with_a_search_in_it_is_not_written_to(finished: Path) -> None:
    before = results(finished), (finished / ".hydra" / "overrides.yaml").read_text()
    error = call("search", *TINY, "seed=5", f"run_dir={finished}", cwd=finished.parent).error
    assert "holds a finished search: choose another" in error
    assert (results(finished), (finished / ".hydra" / "overrides.yaml").read_text()) == before


FULL = """
import resource, signal
from dqss.lit.checkpoint import AtomicCheckpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save, saved = AtomicCheckpoints.save_checkpoint, []

def shrinking(self, *args, **kwargs):
    if saved:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    saved.append(save(self, *args, **kwargs))

AtomicCheckpoints.save_checkpoint = shrinking
"""


def test_disk_full_leaves_the_old_file_whole(tmp_path: Path) -> None:
    """The limit comes when the second checkpoint is to take the place of the first."""
    words = (*TINY, "logger=none", "method.checkpoint_every=1", "run_dir=out")
    outcome = finish(spawn("search", *words, cwd=tmp_path, prelude=FULL))
    assert "cannot write" in outcome.error and "last.ckpt" in outcome.error
    assert "raise the file size limit" in outcome.error
    last = torch.load(tmp_path / "out" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == len(last["history"]) == 1
    assert not list((tmp_path / "out").rglob("*.tmp"))
    # Space again: nothing is lost, the search goes on to its end.
    assert call("search", "resume=out", cwd=tmp_path).code == 0
    assert results(tmp_path / "out")["metrics"]["steps"] == 3


# -- resume -----------------------------------------------------------------------------------


def test_resume_of_what_cannot_be_resumed(tmp_path: Path, finished: Path) -> None:
    assert "no config.yaml there" in call("search", "resume=nowhere", cwd=tmp_path).error
    assert not (tmp_path / "nowhere").exists()
    error = call("search", f"resume={finished}", cwd=tmp_path).error
    assert "this search is finished" in error
    error = call("search", "-m", f"resume={finished}", cwd=tmp_path).error
    assert "--multirun" in error


def test_uninstalled_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what an installation maps below dqss, only the folder of that name is found."""
    installed = [finder for finder in sys.meta_path if "Editable" not in str(finder)]
    monkeypatch.setattr(sys, "meta_path", installed)
    for name in [name for name in sys.modules if name.startswith("dqss.conf")]:
        monkeypatch.delitem(sys.modules, name)
    if importlib.util.find_spec("dqss.conf") is not None:
        pytest.skip("dqss is not an editable install here")
    assert "pip install -e ." in call("search", *TINY, cwd=tmp_path).error
    assert not list(tmp_path.iterdir())

"""Networks that enlarge pictures from the command line: search, training search, and bad input."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dqss.models.ditn import DITN
from tests.cli.runner import call
from tests.support.pictures import write_picture


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An odd one, a grey one and one with an alpha channel that hides nothing."""
    folder = tmp_path_factory.mktemp("pictures")
    write_picture(folder / "0.png", 41, 45)
    for name, mode in (("1.png", "L"), ("2.png", "RGBA")):
        Image.open(folder / "0.png").transpose(Image.Transpose.ROTATE_90).convert(mode).save(folder / name)
    return folder


def words(experiment: str, pictures: Path) -> list[str]:
    return [
        f"+experiment={experiment}",
        "data=pictures",
        f"data.calibration_dir={pictures}",
        f"data.validation_dir={pictures}",
        "data.patch=16",
        "data.calibration_images=6",
        "search_space.weight_algorithms=[minmax,mse]",
        "search_space.activation_algorithms=[minmax,mse]",
    ]


def test_search_leaves_metrics_in_decibels_and_pieces_of_pictures(pictures: Path, tmp_path: Path) -> None:
    more = ["method.steps=3", "method.refine.passes=1", "method.loss=picture", "run_dir=out"]
    outcome = call("search", *words("rlfn_ptq", pictures), *more, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert "psnr" in outcome.out and "dB" in outcome.out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["float"]["validation"]["psnr"] >= metrics["searched"]["validation"]["psnr"] - 1
    strategy = json.loads((tmp_path / "out" / "strategy.json").read_text())
    bits = {name: layer["weight"]["bits"] for name, layer in strategy["layers"].items()}
    assert {name for name, width in bits.items() if width == 8} == {"conv_1", "upsampler.0"}
    found = {file.name for file in (tmp_path / "out" / "pictures").iterdir()}
    shown = ["input", "bicubic", "float", "searched", "original", "difference"]
    assert {f"0_{name}.png" for name in shown} <= found
    outcome = call("evaluate", f"strategy={tmp_path / 'out'}", "run_dir=again", cwd=tmp_path)
    assert outcome.code == 0, outcome.err


def test_training_search(pictures: Path, tmp_path: Path) -> None:
    given = [word for word in words("rlfn_qat", pictures) if "_algorithms" not in word]
    algorithms = [
        "search_space.weight_algorithms=[lsq,dorefa]",
        "search_space.activation_algorithms=[lsq_plus,pams]",
    ]
    more = ["method.epochs=1", "method.tune_epochs=0.5", "run_dir=out"]
    outcome = call("search", *given, *algorithms, *more, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["searched"]["validation"]["count"] == 3 and metrics["searched"]["validation"]["psnr"] > 0


def test_ditn_wants_the_users_weights(pictures: Path, tmp_path: Path) -> None:
    given = [*words("ditn_ptq", pictures), "data.patch=8", "dry_run=true"]
    error = call("search", *given, cwd=tmp_path).error
    assert "no weights of ditn_real x4 are shipped: give model.checkpoint=FILE" in error
    torch.save(DITN(4).state_dict(), tmp_path / "ditn.pth")
    outcome = call("search", *given, "model.checkpoint=ditn.pth", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    # Attention's products of two activations are counted.
    assert "product" in outcome.out


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (["data.patch=14"], "at least 15x15"),
        (["data.patch=30"], "too small for patches of 30"),
        (["search_space.edges=[conv_0]"], "no layer matches 'conv_0' (did you mean"),
        (["search_space.edge_bits=1"], "bits=1"),
        (["method.loss=pictures"], "did you mean 'picture'"),
        (["model=rlfn_x4", "model.checkpoint=none.pth"], "none.pth"),
        (["data=digits", "~data.patch"], "is for classifiers"),
    ],
)
def test_bad_input_is_one_line(changes: list[str], fault: str, pictures: Path, tmp_path: Path) -> None:
    given = words("rlfn_ptq", pictures)
    if "data=digits" in changes:
        given, changes = [], ["model=photographs_rlfn_x2"]
    assert fault in call("search", *given, *changes, cwd=tmp_path).error


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("small", "pixels when shrunk: the network takes images of at least 15x15"), ("clear", "transparent")],
)
def test_pictures_that_cannot_be_used_are_named(
    kind: str, fault: str, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    bad = write_picture(folder / "bad.png", 28 if kind == "small" else 40, 40)
    if kind == "clear":
        image = Image.open(bad).convert("RGBA")
        image.putalpha(7)
        image.save(bad)
    more = ["method.steps=1", "method.refine.passes=0", f"data.validation_dir={folder}"]
    error = call("search", *words("rlfn_ptq", pictures), *more, cwd=tmp_path).error
    assert fault in error and "bad.png" in error

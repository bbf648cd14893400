"""``python -m dqss.evaluate`` measures what the search measured, to the same bits."""

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.runner import call


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def test_the_searched_numbers_come_out_again(finished: Path, tmp_path: Path) -> None:
    outcome = call("evaluate", f"strategy={finished}", "run_dir=again", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    before = json.loads((finished / "metrics.json").read_text())
    after = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert after["searched"]["validation"] == before["searched"]["validation"]
    assert after["float"]["validation"] == before["float"]["validation"]
    assert after["distance"] == before["distance"]
    assert f"{before['searched']['validation']['distance']:.4f}" in outcome.out
    assert [entry.name for entry in tmp_path.iterdir()] == ["again"]


def test_single_options_of_the_searched_data_and_model_change(finished: Path, tmp_path: Path) -> None:
    words = (f"strategy={finished / 'strategy.json'}", "data.batch_size=599", "run_dir=x")
    assert call("evaluate", *words, cwd=tmp_path).code == 0
    before = json.loads((finished / "metrics.json").read_text())["searched"]["validation"]
    after = json.loads((tmp_path / "x" / "metrics.json").read_text())["searched"]["validation"]
    assert after["count"] == before["count"] == 599
    assert after["distance"] == pytest.approx(before["distance"], rel=1e-5)
    error = call("evaluate", f"strategy={finished}", "data.batch_sise=5", cwd=tmp_path).error
    assert "data.batch_sise: unknown option (did you mean 'batch_size'?)" in error
    error = call("evaluate", f"strategy={finished}", "model.checkpoint=no.pth", cwd=tmp_path).error
    assert "no.pth does not exist" in error


def test_another_data_group(finished: Path, tmp_path: Path) -> None:
    words = ("data=imagefolder", "data.calibration_dir=.", "data.validation_dir=nowhere")
    error = call("evaluate", f"strategy={finished}", *words, cwd=tmp_path).error
    assert "data.validation_dir=nowhere does not exist" in error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model=resnet56"], "the strategy is for another model"),
        (["model=resnet20", "model.in_channels=1", "model.image_size=8"], "other weights than were searched"),
        (["force=perhaps"], "force=perhaps: expected true or false"),
    ],
)
def test_another_model_is_refused(finished: Path, tmp_path: Path, words: list[str], expected: str) -> None:
    assert expected in call("evaluate", f"strategy={finished}", *words, cwd=tmp_path).error


def test_other_weights_may_be_forced(finished: Path, tmp_path: Path) -> None:
    words = ("model=resnet20", "model.in_channels=1", "model.image_size=8", "force=true", "run_dir=x")
    assert call("evaluate", f"strategy={finished}", *words, cwd=tmp_path).code == 0


def test_no_strategy_there(tmp_path: Path) -> None:
    assert "strategy is not given" in call("evaluate", cwd=tmp_path).error
    assert "no such file" in call("evaluate", "strategy=nowhere", cwd=tmp_path).error.lower()


def test_truncated_strategy(copied: Path) -> None:
    file = copied / "strategy.json"
    file.write_bytes(file.read_bytes()[:-100])
    assert "no valid JSON" in call("evaluate", f"strategy={copied}", cwd=copied.parent).error


def test_edited_strategy(copied: Path) -> None:
    file = copied / "strategy.json"
    content = json.loads(file.read_text())
    content["layers"]["conv1"]["weight"]["bits"] = 99
    file.write_text(json.dumps(content))
    error = call("evaluate", f"strategy={copied}", cwd=copied.parent).error
    assert "layers.conv1.weight.bits" in error and "99" in error


def test_newer_strategy(copied: Path) -> None:
    file = copied / "strategy.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema_version": 2, "dqss": "9.0"}))
    assert "written by dqss 9.0" in call("evaluate", f"strategy={copied}", cwd=copied.parent).error


def test_damaged_tensors_and_configuration(copied: Path) -> None:
    (copied / "config.yaml").write_text("model: [")
    assert "config.yaml is damaged" in call("evaluate", f"strategy={copied}", cwd=copied.parent).error
    file = copied / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "tensors.safetensors" in call("evaluate", f"strategy={copied}", cwd=copied.parent).error

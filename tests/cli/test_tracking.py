"""What trackers have of a search, read back from their own files."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dqss.strategy import Strategy
from tests.cli.runner import TINY, call
from tests.support.wandb_file import records, value_of


def searched(folder: Path, *words: str) -> Path:
    outcome = call("search", *TINY, *words, "run_dir=out", cwd=folder)
    assert outcome.code == 0, outcome.err
    return folder / "out"


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Run folder, and all records of its offline run."""
    place = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DATA_DIR", str(place / "data"))
        folder = searched(place, "logger=wandb", "logger.offline=true")
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    return folder, list(records(file)), file.parent


def rows_of(found: list[Any]) -> list[dict[str, Any]]:
    return [dict(map(value_of, record.history.item)) for record in found if record.HasField("history")]


def test_the_configuration(tracked: Any) -> None:
    _, found, _ = tracked
    config: dict[str, Any] = {}
    for record in found:
        for update in (record.config, record.run.config):
            config |= dict(map(value_of, update.update))
    assert config["seed"] == 0 and config["search_space"]["weight_bits"] == 2
    assert config["method"]["steps"] == 3 and config["model"]["_target_"].startswith("dqss.")


def test_losses_and_margins_of_every_step(tracked: Any) -> None:
    folder, found, _ = tracked
    lines = (folder / "history.csv").read_text().splitlines()
    wanted = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    rows = [row for row in rows_of(found) if "search/soft_loss" in row]
    assert len(rows) == len(wanted) == 3
    for row, line in zip(rows, wanted, strict=True):
        for key in ("soft_loss", "margin_mean", "margin_min", "entropy"):
            assert row[f"search/{key}"] == float(line[key])


def test_measurements_choices_and_heat_maps(tracked: Any) -> None:
    folder, found, place = tracked
    metrics, strategy = json.loads((folder / "metrics.json").read_text()), Strategy.load(folder)
    (last,) = (row for row in rows_of(found) if "final/searched/validation/kl" in row)
    assert last["final/searched/validation/kl"] == metrics["searched"]["validation"]["distance"]
    assert last["final/best_uniform/selection/top1"] == metrics["best_uniform"]["selection"]["top1"]
    table = json.loads((place / "files" / last["strategy/choices/path"]).read_text())
    assert [row[:2] for row in table["data"]] == [[layer, role] for layer, role, _ in strategy.choices()]
    assert [row[4] for row in table["data"]] == [choice.probability for _, _, choice in strategy.choices()]
    for kind, role in (("weights", "weight"), ("activations", "activation")):
        figure = json.loads((place / "files" / last[f"strategy/{kind}/path"]).read_text())
        (heat,) = figure["data"]
        chosen = [choice for _, of, choice in strategy.choices() if of == role]
        assert heat["y"] == [choice.decision for choice in chosen]
        values = np.array(_numbers(heat["z"])).reshape(len(heat["y"]), len(heat["x"]))
        for row, choice in zip(values, chosen, strict=True):
            assert row[heat["x"].index(choice.candidate().title)] == pytest.approx(choice.probability)
            assert row.sum() == pytest.approx(1, abs=1e-5)


def _numbers(packed: Any) -> Any:
    """Plotly writes arrays as lists, or as bytes in base 64."""
    if isinstance(packed, dict):
        return np.frombuffer(base64.b64decode(packed["bdata"]), np.dtype(packed["dtype"]))
    return packed


def test_the_strategy_as_an_artifact(tracked: Any) -> None:
    folder, found, _ = tracked
    (artifact,) = (r.artifact for r in _artifacts(found) if r.artifact.type == "strategy")
    entries = {entry.path: entry for entry in artifact.manifest.contents}
    assert set(entries) == {"strategy.json", "tensors.safetensors", "metrics.json", "report.html"}
    for name, entry in entries.items():
        digest = hashlib.md5((folder / name).read_bytes()).digest()
        assert base64.b64decode(entry.digest) == digest, name
    assert json.loads(artifact.metadata)["model"] == "digits digits_resnet20"


def _artifacts(found: list[Any]) -> list[Any]:
    """They are records of their own, or requests."""
    requests = [r.request.log_artifact for r in found if r.request.HasField("log_artifact")]
    return [record for record in found if record.HasField("artifact")] + requests


def test_runs_of_a_sweep_are_grouped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    words = ("logger=wandb", "logger.offline=true", "seed=0,1", "run_dir=my_sweep", "--multirun")
    outcome = call("search", *TINY, *words, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    files = sorted((tmp_path / "my_sweep").glob("*/wandb/offline-run-*/run-*.wandb"))
    runs = [record.run for file in files for record in records(file) if record.HasField("run")]
    assert len(files) == 2 and {run.run_group for run in runs} == {"my_sweep"}
    assert len({run.run_id for run in runs}) == 2


def test_tensorboard(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = searched(tmp_path, "logger=tensorboard")
    events = event_accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert len(events.Scalars("search/soft_loss")) == 3 and len(events.Scalars("search/margin_min")) == 3
    (last,) = events.Scalars("final/searched/validation/kl")
    assert last.value == pytest.approx(metrics["searched"]["validation"]["distance"])
    (image,) = events.Images("strategy/weights")
    assert (image.height, image.width) == (20 * 8, 2 * 16)
    (words,) = events.Tensors("strategy/choices/text_summary")
    assert b"layer3.2.conv2 activation: m" in words.tensor_proto.string_val[0]

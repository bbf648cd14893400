"""What a search prints and writes, and where."""

import json
from pathlib import Path

import pytest

from dqss import load
from dqss.apply import apply_strategy
from dqss.models.factory import digits_resnet20
from tests.cli.runner import TINY, call, finish, results, spawn

LINES = [
    "digits digits_resnet20; digits: 24 calibration images out of 1198 training images, "
    "599 validation images",
    "calibrate ...",
    "search ...",
    "discretize ...",
    "measure ...",
]


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory):
    """A search in a process of its own, resumed in another after it was stopped half-way."""
    folder = tmp_path_factory.mktemp("process")
    return finish(spawn("search", *TINY, cwd=folder)), folder


def test_nothing_but_the_progress_is_said(process) -> None:
    outcome, _ = process
    assert outcome.code == 0
    # What torch says about CUDA and compilers on an odd machine is not ours to hide.
    said = [line for line in outcome.err.splitlines() if "torch/" not in line]
    assert said == LINES


def test_everything_is_in_one_folder(process) -> None:
    _, folder = process
    (run,) = (folder / "outputs" / "search").iterdir()
    assert [entry.name for entry in folder.iterdir()] == ["outputs"]
    assert sorted(entry.name for entry in run.iterdir()) == [
        ".hydra", "checkpoints", "config.yaml", "history.csv", "logs", "measured.jsonl",
        "metrics.json", "report.html", "report.json", "search.log", "strategy.json", "tensors.safetensors",
        "trajectory.safetensors",
    ]  # fmt: skip


def test_the_same_command_gives_the_same_bits(process, finished: Path) -> None:
    _, folder = process
    (run,) = (folder / "outputs" / "search").iterdir()
    assert results(run) == results(finished)


def test_the_last_table_fits_eighty_columns(process) -> None:
    lines = process[0].out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert lines[-1].startswith("strategy in ")
    floats, best, searched = lines[-4:-1]
    assert floats.startswith("float ") and best.startswith("best uniform ")
    assert searched.startswith("searched ")
    layers = [line.split() for line in lines[1 : lines.index("")]]
    assert len(layers) == 20 and all(len(cells) == 5 for cells in layers)


def test_long_names_fit_eighty_columns_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep_nets.py").write_text(
        "from torch import nn\n"
        "def deep():\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        "    for level in range(12):\n"
        "        outer = nn.Sequential(); outer.add_module(f'encoder_block{level}', net); net = outer\n"
        "    return net\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ("model=own", "model.target=deep_nets:deep", "model.input={size:[1,8,8],mean:[0.5],std:[0.5]}")
    algorithms = "search_space.weight_algorithms=[{name:percentile,p:99.99},aciq_gaussian]"
    outcome = call("search", *TINY, *words, algorithms, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert max(map(len, outcome.out.splitlines()[:-1])) <= 80


def test_dry_run_plans_and_writes_no_results(tmp_path: Path) -> None:
    outcome = call(
        "search", *TINY, "search_space.weight_bits=[4,8]", "dry_run=true", "run_dir=out", cwd=tmp_path
    )
    assert outcome.code == 0, outcome.err
    assert "20 layers, 40 decisions, 120 candidates, 8 uniform strategies" in outcome.out
    assert "minutes on this machine" in outcome.out and "MiB" in outcome.out
    assert "layer3.2.conv2  4 candidates (minmax@4, ...)" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {".hydra", "search.log"}
    # The same folder then takes the search itself.
    assert call("search", *TINY, "run_dir=out", cwd=tmp_path).code == 0


def test_a_list_of_bits(tmp_path: Path) -> None:
    words = ("search_space.weight_bits=[4,8]", "run_dir=out", "method.steps=1", "logger=none")
    assert call("search", *TINY, *words, cwd=tmp_path).code == 0
    strategy = results(tmp_path / "out")["strategy"]
    assert {layer["weight"]["bits"] for layer in strategy["layers"].values()} <= {4, 8}
    assert not (tmp_path / "out" / "logs").exists()


def test_time_limit_still_exports_the_best_so_far(tmp_path: Path) -> None:
    words = ("method.steps=5000", "method.refine.passes=1000", "method.max_minutes=0.02", "run_dir=out")
    outcome = call("search", *TINY, *words, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert "time limit: search stops after" in outcome.err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert 1 <= metrics["steps"] < 500
    assert metrics["seconds"]["search"] + metrics["seconds"]["calibrate"] < 30
    distances = {row: metrics[row]["selection"]["distance"] for row in ("searched", "best_uniform")}
    assert distances["searched"] <= distances["best_uniform"]
    apply_strategy(digits_resnet20().module, load(tmp_path / "out"))


def test_relative_paths_are_relative_to_the_working_directory(images: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(images)
    words = ("data=imagefolder", "data.calibration_dir=images", "run_dir=results/here", "logger=none")
    assert call("search", *TINY, *words, cwd=tmp_path).code == 0
    assert (tmp_path / "results" / "here" / "strategy.json").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["images", "results"]
    # From another folder, the stored configuration still finds them.
    (tmp_path / "elsewhere").mkdir()
    words = ("strategy=../results/here", "data.validation_dir=../images", "run_dir=out")
    outcome = call("evaluate", *words, cwd=tmp_path / "elsewhere")
    assert outcome.code == 0, outcome.err
    measured = json.loads((tmp_path / "elsewhere" / "out" / "metrics.json").read_text())
    assert measured["searched"]["validation"]["count"] == 40


def test_a_sweep_over_seeds(tmp_path: Path, finished: Path) -> None:
    words = ("seed=0,1", "run_dir=sweep", "logger=none", "--multirun")
    outcome = call("search", *TINY, *words, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    runs = (results(path.parent) for path in (tmp_path / "sweep").glob("*/strategy.json"))
    first, second = sorted(runs, key=lambda run: run["strategy"]["seed"])  # type: ignore[index]
    assert first == results(finished)
    assert second["strategy"]["seed"] == 1 and second["history"] != first["history"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["sweep"]


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = ("logger=wandb", "logger.offline=true", "run_dir=out")
    outcome = call("search", *TINY, *words, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    (log,) = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert b"search/soft_loss" in content and b"search/margin_mean" in content
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_train_writes_weights_that_can_be_searched(tmp_path: Path) -> None:
    quick = ("recipe.epochs=1", "progress=quiet", "run_dir=trained")
    outcome = call("train", *quick, cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert "top1 " in outcome.out
    words = ("model.checkpoint=trained/weights.safetensors", "dry_run=true", "run_dir=out")
    assert call("search", *TINY, *words, cwd=tmp_path).code == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "trained"]

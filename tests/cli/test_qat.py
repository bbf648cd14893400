"""QAT from the command line: search, resume, evaluate, export."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.runner import call, finish, results, spawn

TINY = (
    "+experiment=resnet_qat",
    "data.calibration_images=24",
    "method.batch_size=64",
    "method.epochs=0.3",
    "method.tune_epochs=0.2",
    "method.record_every=1",
    "method.checkpoint_every=1",
    "search_space.weight_algorithms=[lsq,dorefa]",
    "search_space.activation_algorithms=[lsq,lsq_plus]",
)
"""Five steps of search and four of tuning."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qat")
    outcome = call("search", *TINY, "run_dir=out", cwd=folder)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert [line.split()[0] for line in lines[-4:-1]] == ["float", "argmax", "searched"]
    return folder / "out"


def test_strategy_metrics_and_history_are_there(whole: Path) -> None:
    strategy = json.loads((whole / "strategy.json").read_text())
    assert strategy["method"] == "qat" and len(strategy["layers"]) == 20
    assert {layer["weight"]["algorithm"] for layer in strategy["layers"].values()} <= {"lsq", "dorefa"}
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["float"]["validation"]["top1"] > 0.99 and metrics["best_uniform"] is None
    assert metrics["searched"]["validation"]["count"] == 599
    with open(whole / "history.csv", newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(steps) and len(steps) == 9


def test_evaluate_measures_the_tuned_network(whole: Path, tmp_path: Path) -> None:
    outcome = call("evaluate", f"strategy={whole}", "run_dir=again", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    metrics = json.loads((whole / "metrics.json").read_text())
    assert again["searched"]["validation"]["top1"] == metrics["searched"]["validation"]["top1"]
    wanted = metrics["searched"]["validation"]["distance"]
    assert again["searched"]["validation"]["distance"] == pytest.approx(wanted, rel=1e-6)


def test_resumed_after_a_kill_it_is_the_same(whole: Path, tmp_path: Path) -> None:
    prelude = (
        "from dqss.lit.checkpoint import SafeKeeping as K; keep = K.on_train_batch_end\n"
        "def stop(self, trainer, *args):\n"
        "    keep(self, trainer, *args)\n"
        "    import os\n"
        "    if trainer.global_step == 3: os._exit(9)\n"
        "K.on_train_batch_end = stop"
    )
    assert finish(spawn("search", *TINY, "run_dir=out", cwd=tmp_path, prelude=prelude)).code == 9
    outcome = call("search", "resume=out", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert results(tmp_path / "out") == results(whole)


def test_dry_run_plans(tmp_path: Path) -> None:
    outcome = call("search", *TINY, "dry_run=true", cwd=tmp_path)
    assert outcome.code == 0, outcome.err
    assert "20 layers, 40 decisions, 80 candidates" in outcome.out
    assert "9 steps" in outcome.out and "minutes on this machine" in outcome.out


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["method.start=flaot"], "did you mean 'float'"),
        (["method.epochs=-1"], "method.epochs=-1"),
        (["search_space.products=true"], "products"),
        (["search_space.weight_algorithms=[lqs]"], "did you mean 'lsq'"),
        (["search_space.weight_algorithms=[pact]"], "use lsq or dorefa"),
        (["+trainer.devices=2"], "torchrun --nproc_per_node=2"),
    ],
)
def test_bad_input_is_one_line(words: list[str], fault: str, tmp_path: Path) -> None:
    assert fault in call("search", *TINY, *words, cwd=tmp_path).error


def test_algorithms_that_learn_are_not_for_frozen_networks(tmp_path: Path) -> None:
    words = ["+experiment=resnet_ptq", "search_space.weight_algorithms=[lsq]"]
    assert "method=qat" in call("search", *words, cwd=tmp_path).error


def test_data_without_a_training_part_is_refused(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("L", (8, 8), 40 * number).save(tmp_path / f"{number}.png")
    words = ["data=imagefolder", f"data.calibration_dir={tmp_path}"]
    assert "data.train_dir is not given" in call("search", *TINY[:1], *words, cwd=tmp_path).error

"""Repair as a stage of the search: measured, exported only if better, and wired to the command line."""

import json
from pathlib import Path

import pytest
import torch

import dqss
from dqss.discretize import RefineSettings
from dqss.errors import UserError
from dqss.lit.search import SearchResult, search_ptq
from dqss.lit.settings import PTQSettings
from dqss.losses import KLDivergence
from dqss.repair import RepairSettings
from dqss.samples import split
from tests.repair.support import FAST, network, pictures
from tests.support.nets import small_space

QUICK = {"steps": 6, "batch_size": 8, "refine": RefineSettings(passes=1), "discrete_every": 0}


def searched(folder: Path | None, **options: object) -> SearchResult:
    repair = RepairSettings(**{**FAST, **options})  # type: ignore[arg-type]
    settings = PTQSettings(**QUICK, repair=repair)  # type: ignore[arg-type]
    return search_ptq(network(), pictures(), small_space(3), settings, run_dir=folder)


def test_the_better_one_is_exported_and_measured(tmp_path: Path) -> None:
    result = searched(tmp_path, learn_steps=True, bias_correction=True)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    rows = {name: metrics[name]["selection"]["distance"] for name in ("searched", "repaired", "unrepaired")}
    assert metrics["searched"]["name"] == "repaired"
    assert rows["searched"] == rows["repaired"] < rows["unrepaired"]
    # The same on what is rebuilt from the folder.
    bundle = dqss.load(tmp_path)
    assert bundle.strategy.repair is not None
    assert bundle.strategy.metrics["searched"] == metrics["searched"]
    rebuilt = dqss.apply_strategy(network(), bundle)
    selection = pictures()[split(48, PTQSettings().parts, 0)[1]]
    with torch.no_grad():
        distance = KLDivergence()(rebuilt(selection), result.model(selection))
    assert float(distance) == pytest.approx(rows["searched"], rel=1e-3)
    assert "searched, before the repair" in (tmp_path / "report.html").read_text()
    # What the supernet is has not changed.
    assert result.supernet.model is not rebuilt and metrics["seconds"]["repair"] > 0


def test_a_repair_that_makes_nothing_better_is_not_exported(tmp_path: Path) -> None:
    # No iterations and no bias correction: nothing is better, and that is not enough.
    result = searched(tmp_path, iterations=0)
    assert result.metrics["searched"]["name"] == result.metrics["unrepaired"]["name"]
    assert dqss.load(tmp_path).strategy.repair is None


def test_without_repair_nothing_is_there() -> None:
    result = search_ptq(network(), pictures(), small_space(3), PTQSettings(**QUICK))  # type: ignore[arg-type]
    assert "repaired" not in result.metrics and result.bundle.strategy.repair is None


def test_a_word_in_place_of_a_group() -> None:
    with pytest.raises(UserError, match=r"repair@method\.repair=blocks"):
        PTQSettings(repair="blocks")  # type: ignore[arg-type]


def test_transformations_that_do_not_suit_are_refused_before_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(*arguments: object) -> None:
        raise AssertionError("searched all the same")

    monkeypatch.setattr("dqss.lit.search.build", build)
    settings = PTQSettings(**QUICK, repair=RepairSettings(augment=["flip"]))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"repair.augment: flip is for images"):
        search_ptq(network(), torch.rand(8, 7), small_space(3), settings)

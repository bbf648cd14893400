"""Uniform strategies measured before the search: it begins with what they have shown."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from dqss.discretize import RefineSettings
from dqss.lit.ptq import PTQSearch
from dqss.lit.settings import PTQSettings
from tests.support.searches import QUICK, quick


class KilledError(Exception):
    """In the middle of a search."""


def test_a_search_that_begins_with_what_was_shown_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(QUICK, screen_first=True, screen_images=4, checkpoint_every=2)
    whole, _ = quick(settings=settings, run_dir=tmp_path / "whole")
    blank, _ = quick(settings=replace(settings, screen_first=False))
    # Less is open from the first step on than in a search that knows nothing.
    assert whole.history[0]["entropy"] < 0.6 * blank.history[0]["entropy"]
    step, calls = PTQSearch.training_step, itertools.count()

    def killed(module: PTQSearch, *args: Any) -> Tensor:
        if next(calls) == 4:
            raise KilledError
        return step(module, *args)

    with monkeypatch.context() as patched, pytest.raises(KilledError):
        patched.setattr(PTQSearch, "training_step", killed)
        quick(settings=settings, run_dir=tmp_path / "cut")
    resumed, _ = quick(settings=settings, run_dir=tmp_path / "cut")
    for key in ("soft_loss", "entropy"):
        assert [row[key] for row in resumed.history] == [row[key] for row in whole.history]
    assert resumed.discretized == whole.discretized
    assert resumed.metrics["evaluations"] == whole.metrics["evaluations"]


def test_what_is_left_open_is_decided_by_the_bits() -> None:
    easy, hard = PTQSettings().at(8), PTQSettings().at(7)
    assert (easy.steps, easy.screen_first, easy.screen_images, easy.refine.passes) == (120, True, 8, 0)
    assert (hard.steps, hard.screen_first, hard.screen_images, hard.refine.passes) == (600, False, 16, 10)
    assert (easy.batch_size, hard.batch_size) == (4, 8)
    said = PTQSettings(
        steps=7, batch_size=5, screen_first=False, screen_images=9, refine=RefineSettings(passes=3, screen=2)
    )
    assert said.at(8) == said.at(2) == said
    assert PTQSettings().at(8).at(2) == easy


def test_strategies_are_screened_once() -> None:
    """Before or after the search, the same strategies on the same images: all cost the same."""
    settings = replace(QUICK, screen_images=4, refine=RefineSettings(passes=0))
    spent = {
        first: quick(settings=replace(settings, screen_first=first))[0].metrics["evaluations"]
        for first in (True, False)
    }
    assert spent[True] == spent[False]

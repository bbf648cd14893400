"""Stopping early: when nothing has changed, with the strategy of that moment, and for good."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqss.decision import Decision
from dqss.errors import UserError
from dqss.lit.schedules import MeanFieldSchedule
from dqss.lit.settings import PTQSettings
from dqss.lit.unchanged import CERTAIN, Unchanged
from tests.support.searches import Recorder, fit, search

LOGITS = {"undecided": [0.0, 0.5, 0.0], "first": [9.0, 0.0, 0.0], "second": [0.0, 8.0, 1.0]}


@given(st.lists(st.tuples(*2 * [st.sampled_from(list(LOGITS))]), max_size=12), st.integers(1, 4))
def test_steps_count_where_nothing_changes_and_little_is_open(
    path: list[tuple[str, ...]], patience: int
) -> None:
    decisions = [Decision("a", range(3)), Decision("b", range(3))]
    unchanged = Unchanged(decisions, patience)
    wanted = 0
    for step, names in enumerate(path):
        for decision, name in zip(decisions, names, strict=True):
            decision.logits.data.copy_(torch.tensor(LOGITS[name]))
        unchanged.observe()
        now, before = (
            [int(np.argmax(LOGITS[name])) for name in path[k]] if k >= 0 else None for k in (step, step - 1)
        )
        entropy = np.mean([scipy.stats.entropy(scipy.special.softmax(LOGITS[name])) for name in names])
        wanted = wanted + 1 if now == before and entropy <= CERTAIN * math.log(3) else 0
        assert unchanged.steps == wanted and unchanged.done == (wanted >= patience)
        # Interrupted here, it goes on alike.
        again = Unchanged(decisions, patience)
        again.load_state_dict(unchanged.state_dict())
        unchanged = again


def test_options_that_are_alike_leave_nothing_open() -> None:
    decision = Decision("d", range(3))
    decision.recognize(["same", "same", "same"])
    unchanged = Unchanged([decision], 1)
    unchanged.observe()
    assert not unchanged.done
    unchanged.observe()
    assert unchanged.done


SCHEDULE = MeanFieldSchedule(reheats=2, reheat_steps=4)


def argmax(logits: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: int(values.argmax()) for name, values in logits.items()}


def test_it_ends_in_the_strategy_of_the_undisturbed_search_at_that_step() -> None:
    whole, short = Recorder(), Recorder()
    fit(search(SCHEDULE, steps=40), whole)
    module = fit(search(SCHEDULE, steps=40, stop_after=3), short)
    module.settle()
    steps = len(short.logits)
    assert module.finished and steps == len(module.history) < 40
    for stopped, undisturbed in zip(short.logits, whole.logits, strict=False):
        assert all(torch.equal(stopped[name], undisturbed[name]) for name in stopped)
    assert module.found[-1] == argmax(whole.logits[steps - 1]) == argmax(whole.logits[steps - 4])
    # The strategies of the falls before it are kept, later ones are not waited for.
    assert len(module.found) == 1 + sum(step < steps for step in SCHEDULE.cold(40))


def test_none_runs_all_steps() -> None:
    module = fit(search(SCHEDULE, steps=40))
    assert len(module.history) == 40 and not module.finished


def test_its_state_is_part_of_a_checkpoint() -> None:
    module = fit(search(SCHEDULE, steps=40, stop_after=3))
    kept: dict[str, Any] = {}
    module.on_save_checkpoint(kept)
    fresh = search(SCHEDULE, steps=40, stop_after=3)
    assert not fresh.finished
    fresh.on_load_checkpoint(kept)
    assert fresh.finished and fresh.unchanged.state_dict() == module.unchanged.state_dict()


@pytest.mark.parametrize("bad", [0, -3])
def test_no_steps_are_refused(bad: int) -> None:
    with pytest.raises(UserError, match=rf"method\.stop_after={bad}: expected a positive number"):
        PTQSettings(stop_after=bad)

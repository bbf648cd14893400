"""Decisions that have settled: when they are frozen, that they stay so, and that it can be interrupted."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st

from dqss.decision import Decision, Sampled
from dqss.errors import UserError
from dqss.lit.schedules import GumbelSchedule, MeanFieldSchedule, Schedule, SoftmaxSchedule
from dqss.lit.settling import Settled, Settling
from tests.support.nets import small_space
from tests.support.searches import Recorder, fit, search

SOON = Settling(margin=0.1, patience=3)
SCHEDULES = {
    "mean_field": MeanFieldSchedule(reheats=2, reheat_steps=2),
    "gumbel": GumbelSchedule(),
    "softmax": SoftmaxSchedule(),
    "entropy": SoftmaxSchedule(entropy=3e-4, entropy_delay=0.0),
}


def margin(logits: Sequence[float]) -> float:
    p = np.sort(scipy.special.softmax(np.asarray(logits, dtype=np.float64)))
    return float(p[-1] - p[-2])


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.5, 4.0]), min_size=3, max_size=3), max_size=12),
    st.sampled_from([0.15, 0.45, 0.75]),
    st.integers(1, 4),
)
def test_frozen_after_so_many_certain_steps_in_a_row(
    path: list[list[float]], threshold: float, patience: int
) -> None:
    decision = Decision("d", range(3))
    settled = Settled([decision], Settling(threshold, patience))
    wanted: dict[str, int] = {}
    for step, logits in enumerate(path):
        with torch.no_grad():
            decision.logits.copy_(torch.tensor(logits))
        settled.observe()
        last = path[max(0, step + 1 - patience) : step + 1]
        choices = {int(np.argmax(one)) for one in last}
        certain = len(last) == patience and all(margin(one) >= threshold for one in last)
        if not wanted and certain and len(choices) == 1:
            wanted = {"d": choices.pop()}
        assert settled.frozen == wanted
        # Interrupted here, it goes on alike.
        again = Settled([decision], settled.settling)
        again.load_state_dict(settled.state_dict())
        settled = again
    decision.relaxation = Sampled()
    settled.freeze()
    assert decision.frozen == bool(wanted)
    if wanted:
        assert decision.choice == wanted["d"] and decision.weights()[wanted["d"]] == 1


def test_options_that_are_alike_have_nothing_to_settle() -> None:
    decision = Decision("d", range(3))
    decision.recognize(["same", "same", "same"])
    settled = Settled([decision], Settling(margin=1.0, patience=2))
    settled.observe()
    assert not settled.frozen
    settled.observe()
    assert settled.frozen == {"d": 0}


def first_settled(path: Sequence[torch.Tensor]) -> int | None:
    """The first step after which :data:`SOON` has been true for as long as it takes."""
    for k in range(SOON.patience - 1, len(path)):
        last = path[k + 1 - SOON.patience : k + 1]
        same = len({int(one.argmax()) for one in last}) == 1
        if same and all(margin(one.tolist()) >= SOON.margin for one in last):
            return k
    return None


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
def test_frozen_logits_never_move_again(schedule: Schedule) -> None:
    """... not by momentum, not by the entropy penalty, not when the entropy rises."""
    recorder = Recorder()
    module = fit(search(schedule, steps=16, learning_rate=0.5, settle=SOON), recorder)
    counts = [int(row["frozen"]) for row in module.history]
    assert counts[:3] == [0, 0, 0] and counts == sorted(counts) and counts[-1] > 0
    assert len(counts) == len(recorder.logits) > 1 + next(k for k, count in enumerate(counts) if count)
    names = list(module.supernet.decisions)
    first = {name: first_settled([logits[name] for logits in recorder.logits]) for name in names}
    for name, step in first.items():
        if step is None:
            assert name not in module.settled.frozen
            continue
        assert all(torch.equal(later[name], recorder.logits[step][name]) for later in recorder.logits[step:])
        assert module.settled.frozen[name] == int(recorder.logits[step][name].argmax())
    for k, count in enumerate(counts):
        assert count == sum(step is not None and step < k for step in first.values())
    module.settle()
    assert {n for n, d in module.supernet.decisions.items() if d.frozen} == set(module.settled.frozen)
    assert module.found[-1] == {name: int(recorder.logits[-1][name].argmax()) for name in names}


def test_until_the_first_is_frozen_nothing_differs() -> None:
    plain, settling = Recorder(), Recorder()
    schedule = SCHEDULES["mean_field"]
    fit(search(schedule, steps=16), plain)
    module = fit(search(schedule, steps=16, settle=SOON), settling)
    frozen = next(k for k, row in enumerate(module.history) if row["frozen"])
    for k in range(frozen):
        assert all(torch.equal(plain.logits[k][name], now) for name, now in settling.logits[k].items())
    assert frozen >= 3


def test_the_search_ends_when_everything_is_frozen() -> None:
    one = small_space(3, ["minmax"])
    module = fit(search(SCHEDULES["mean_field"], steps=16, space=one, settle=SOON))
    assert len(module.history) == 3 and module.finished
    assert len(module.settled.frozen) == len(module.supernet.decisions)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
def test_its_state_is_part_of_a_checkpoint(schedule: Schedule) -> None:
    module = fit(search(schedule, steps=10, learning_rate=0.5, settle=SOON))
    assert module.settled.frozen
    kept: dict[str, Any] = {}
    module.on_save_checkpoint(kept)
    fresh = search(schedule, steps=10, learning_rate=0.5, settle=SOON)
    fresh.on_load_checkpoint(kept)
    assert fresh.settled.state_dict() == module.settled.state_dict()
    assert fresh.settled.frozen == module.settled.frozen


@pytest.mark.parametrize("bad", [0.0, -0.5, 1.5, math.nan])
def test_margins_out_of_range_are_refused(bad: float) -> None:
    with pytest.raises(UserError, match=r"method\.settle\.margin=.*: expected a number in 0..1, above 0"):
        Settling(margin=bad)


def test_patience_is_at_least_one_step() -> None:
    with pytest.raises(UserError, match=r"method\.settle\.patience=0: expected 1 or more"):
        Settling(margin=0.9, patience=0)

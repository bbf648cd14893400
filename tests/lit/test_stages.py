"""Stages of a training: every one has the whole schedule."""

import pytest

from dqss.lit.stages import Stages

STAGES = Stages([10, 20, 5], [0.0, 0.5, 0.0], learning_rate=0.1, ramp=0.1)


def test_steps_know_their_stage() -> None:
    assert STAGES.total == 35 and STAGES.starts == [0, 10, 30]
    assert [STAGES.number_at(step) for step in (0, 9, 10, 29, 30, 34, 35)] == [0, 0, 1, 1, 2, 2, 2]
    assert [STAGES.contrastive_at(step) for step in (9, 10, 30)] == [0.0, 0.5, 0.0]


def test_rates_rise_fall_to_nothing_and_start_again() -> None:
    rates = [STAGES.rate_at(step) for step in range(STAGES.total)]
    assert rates[10] == pytest.approx(0.05) and rates[11] == pytest.approx(0.1, rel=0.01)
    assert max(rates) <= 0.1 and rates[11:30] == sorted(rates[11:30], reverse=True)
    assert rates[29] < 0.001 < rates[30]
    # A stage alone has the rates that it has after others.
    alone = Stages([20], [0.0], 0.1, 0.1)
    assert rates[10:30] == [alone.rate_at(step) for step in range(20)]

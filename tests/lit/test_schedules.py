"""Schedules: where they start, where they end, and what lies between."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dqss.decision import Softmax, StraightThroughGumbel
from dqss.errors import UserError
from dqss.lit.schedules import GumbelSchedule, SoftmaxSchedule

temperatures = st.floats(0.01, 10)


@given(temperatures, temperatures, st.floats(0, 1))
def test_temperature_is_geometric_between_its_ends(first: float, last: float, progress: float) -> None:
    for schedule, kind in ((SoftmaxSchedule, Softmax), (GumbelSchedule, StraightThroughGumbel)):
        made = schedule(temperature=first, final_temperature=last)
        start, end, now = (made.relaxation(at) for at in (0.0, 1.0, progress))
        assert type(start) is type(now) is kind
        assert start.temperature == pytest.approx(first) and end.temperature == pytest.approx(last)
        logarithm = (1 - progress) * math.log(first) + progress * math.log(last)
        assert math.log(now.temperature) == pytest.approx(logarithm, abs=1e-9)


@given(st.floats(0.01, 5), st.floats(0, 0.99), st.floats(0, 1))
def test_entropy_waits_then_grows_linearly(weight: float, delay: float, progress: float) -> None:
    made = SoftmaxSchedule(entropy=weight, entropy_delay=delay)
    wanted = weight * max(0.0, (progress - delay) / (1 - delay))
    assert made.entropy_weight(progress) == pytest.approx(wanted, abs=1e-12)
    assert made.entropy_weight(1.0) == pytest.approx(weight)


def test_entropy_that_never_comes() -> None:
    assert SoftmaxSchedule(entropy=1.0, entropy_delay=1.0).entropy_weight(1.0) == 0.0
    assert SoftmaxSchedule().entropy_weight(1.0) == GumbelSchedule().entropy_weight(1.0) == 0.0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("schedule", [SoftmaxSchedule, GumbelSchedule])
def test_temperatures_that_mean_nothing_are_refused(schedule: type, bad: float) -> None:
    for key in ("temperature", "final_temperature"):
        with pytest.raises(UserError, match="temperature"):
            schedule(**{key: bad})

"""Settings out of range are refused by name, whatever is wrong with them."""

from dataclasses import dataclass
from math import nan
from typing import Any

import pytest

from dqss.checks import check_least, check_positive, check_share
from dqss.errors import UserError


@dataclass
class Settings:
    value: Any


@pytest.mark.parametrize("bad", [0, -1, nan, None, "3"])
def test_what_is_not_positive_is_refused(bad: object) -> None:
    with pytest.raises(UserError, match=rf"^method\.value={bad!r}: expected a positive number$"):
        check_positive(Settings(bad), "method", "value")


def test_none_is_refused_where_it_is_not_optional() -> None:
    check_positive(Settings(None), "method", "value", optional=True)
    check_least(Settings(None), "method", 0, "value", optional=True)
    with pytest.raises(UserError, match="0 or more or null"):
        check_least(Settings(-1), "method", 0, "value", optional=True)
    with pytest.raises(UserError, match=r"0 or more$"):
        check_least(Settings(None), "method", 0, "value")


@pytest.mark.parametrize(
    ("value", "right"), [(0, True), (1.0, True), (1.01, False), (-0.1, False), (nan, False)]
)
def test_shares_lie_between_nothing_and_all(value: float, right: bool) -> None:
    if right:
        check_share(Settings(value), "method", "value")
    else:
        with pytest.raises(UserError, match=r"a share in 0\.\.1"):
            check_share(Settings(value), "method", "value")

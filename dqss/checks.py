"""Numbers of settings that are out of range, refused in one line that names the option."""

from __future__ import annotations

from collections.abc import Callable

from dqss.errors import UserError


def check_positive(settings: object, group: str, *names: str, optional: bool = False) -> None:
    """Refuse fields that are not above zero.

    Args:
        settings: has them.
        group: what the options are called before the dot.
        names: of the fields.
        optional: whether they may be None.

    Raises:
        UserError: naming the first that is wrong.
    """
    _check(settings, group, names, lambda value: value > 0, "a positive number", optional)


def check_least(settings: object, group: str, least: int, *names: str, optional: bool = False) -> None:
    """Refuse fields below ``least``; see :func:`check_positive`."""
    _check(settings, group, names, lambda value: value >= least, f"{least} or more", optional)


def check_share(settings: object, group: str, *names: str) -> None:
    """Refuse fields that are not in 0..1; see :func:`check_positive`."""
    _check(settings, group, names, lambda value: 0 <= value <= 1, "a share in 0..1", False)


def _check(
    settings: object,
    group: str,
    names: tuple[str, ...],
    right: Callable[[float], bool],
    expected: str,
    optional: bool,
) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is None and optional:
            continue
        if not isinstance(value, int | float) or not right(value):  # not: NaN is never right
            otherwise = " or null" if optional else ""
            raise UserError(f"{group}.{name}={value!r}: expected {expected}{otherwise}")

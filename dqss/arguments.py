"""Checks of keyword arguments from outside against the annotations of what takes them."""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from dqss.errors import UserError, near_match

_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a word", "words"),
    Path: ("a path", "paths"),
    Any: ("a value", "values"),
    types.NoneType: ("null", "null"),
}


def check_arguments(
    target: Callable[..., Any], given: Mapping[str, Any], where: str, values: bool = True
) -> None:
    """Refuse arguments that ``target`` does not take, and values of another type than annotated.

    Args:
        target: a function or class; annotations that cannot be resolved are not looked at.
        given: what it is going to be called with; plain JSON values are checked.
        where: what the user calls it, for messages (``"method"``).
        values: whether to look at the values too, beside the names.

    Raises:
        UserError: naming the argument, and what was expected.
    """
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return
    open_ended = any(entry.kind is entry.VAR_KEYWORD for entry in parameters.values())
    hints = argument_types(target) if values else {}
    for name, value in given.items():
        if name in parameters:
            check_value(hints.get(name, Any), value, f"{where}.{name}")
        elif not open_ended:
            raise UserError(
                f"{where}.{name}: unknown option{near_match(name, parameters)}; "
                f"{where} takes {', '.join(parameters)}"
            )


def check_value(hint: Any, value: Any, name: str) -> None:
    """Refuse a value that is not of the annotated type; nothing is converted.

    Raises:
        UserError: naming the value, and what was expected.
    """
    if isinstance(value, Mapping) and "_target_" in value:
        return  # an object yet to be made
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=_config(hint))
        text = json.dumps(value)
    except (PydanticUserError, SchemaError, TypeError, ValueError):
        return  # nothing that can be said beforehand
    try:
        # As JSON, strict means: a list may be a tuple and a whole number a float, "4" is no number.
        adapter.validate_json(text, strict=True)
    except ValidationError:
        raise UserError(f"{name}={_shown(value)}: expected {describe(hint)}") from None


def argument_types(target: Callable[..., Any]) -> dict[str, Any]:
    """The resolved annotations of a callable's parameters; empty where they cannot be resolved."""
    function = inspect.getattr_static(target, "__init__") if isinstance(target, type) else target
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):
        return {}


def names_a_path(hint: Any) -> bool:
    """Whether an annotation admits a :class:`pathlib.Path`."""
    return hint is Path or any(names_a_path(part) for part in typing.get_args(hint))


def describe(hint: Any, many: bool = False) -> str:
    """An annotation in the user's words: ``"a whole number or a list of whole numbers"``."""
    if hint in _WORDS:
        return _WORDS[hint][many]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inside = [part for part in parts if not (part is str and Path in parts)]
        return " or ".join(dict.fromkeys(describe(part, many) for part in inside))
    if origin is typing.Literal:
        return " or ".join(str(option) for option in parts)
    plain = origin or hint
    if isinstance(plain, type) and issubclass(plain, Mapping):
        return "mappings" if many else "a mapping"
    if isinstance(plain, type) and issubclass(plain, Sequence):
        inside = list(dict.fromkeys(describe(part, True) for part in parts if part is not Ellipsis))
        count = f"{len(parts)} " if plain is tuple and Ellipsis not in parts else ""
        return f"{'lists' if many else 'a list'} of {count}{' or '.join(inside) or 'values'}"
    return f"a {getattr(plain, '__name__', str(plain))}"


def _config(hint: Any) -> ConfigDict | None:
    # Types that bring a configuration of their own refuse another one.
    own = isinstance(hint, type) and hasattr(hint, "__pydantic_config__")
    return None if own else ConfigDict(arbitrary_types_allowed=True)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

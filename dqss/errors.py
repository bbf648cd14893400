"""Errors that are the user's to mend: one line that names the thing and the way out.

Everything raised as a :class:`UserError` is printed by the command line as one line,
without a stack trace, and ends with exit code 2. In Python they are ordinary exceptions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input: the message names the thing at fault and says what to do about it."""


class DataError(UserError):
    """Inputs that cannot be read, are empty, or have the wrong shape."""


class ModelError(UserError):
    """A model or checkpoint that cannot be loaded or searched."""


class NonFiniteError(UserError):
    """NaN or infinity in weights or activations."""


class SearchSpaceError(UserError):
    """A search space that names an unknown algorithm or matches no layer."""


class StrategyError(UserError):
    """A strategy or bundle that is damaged, too new, or made for another model."""


class OutputError(UserError):
    """A place for results that cannot be written."""


class ExportError(UserError):
    """A network that cannot be written for another runtime."""


class TargetError(UserError):
    """A search space or strategy that asks for what a target does not have."""


class BudgetError(UserError):
    """A limit that no choice of the search space keeps, or that cannot be counted."""


class ParityError(UserError):
    """A file that does not give the simulation's answers."""


def near_match(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to ``word``, or ``""``."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""

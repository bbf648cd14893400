"""Errors that are the user's to mend, in one line."""

from __future__ import annotations

import errno
from importlib.resources import files
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from dqss.errors import UserError, near_match
from dqss.io import output_error

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain(error: BaseException) -> str | None:
    """One line for an error that is the user's to mend; None for one that is ours."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, UserError):
            return in_one_line(chain)
        chain = chain.__cause__
    if isinstance(error, MissingConfigException):
        return _explain_missing(error)
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _explain_config(error)
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"cannot open {str(error.filename)!r}: {error.strerror}"
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _DISK_FULL):
        return str(output_error(str(error.filename or "the results"), error))
    return None


def _explain_missing(error: MissingConfigException) -> str:
    group, _, choice = str(error.missing_cfg_file or "").rpartition("/")
    if error.options:
        options = list(error.options)
        return f"{group}={choice}{near_match(choice, options)}: expected one of {', '.join(options)}"
    if group:
        known = sorted(entry.name for entry in files("dqss.conf").iterdir() if entry.is_dir())
        known = [name for name in known if not name.startswith("_")]
        return f"{group}={choice}: there is no group {group!r}{near_match(group, known)}; {', '.join(known)}"
    return in_one_line(error)


def _explain_config(error: Exception) -> str:
    cause = error.__cause__
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.full_key:
        parent = cause.parent_node
        known = [str(key) for key in parent] if isinstance(parent, DictConfig) else []
        if not known:
            return f"{cause.full_key}: nothing is set there yet; write a + before it to add it"
        return f"{cause.full_key}: unknown option{_suggestion(str(cause.full_key), parent, known)}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not given: add {error.full_key}=VALUE"
    if isinstance(error, OverrideParseException):
        fault = in_one_line(error).partition(" See https")[0]
        return f"{error.override}: {fault}; quote it for the shell, and lists as [a,b]"
    parts = [in_one_line(part) for part in (error, cause) if part is not None and str(part)]
    return "; ".join(dict.fromkeys(parts)) or type(error).__name__


def _suggestion(key: str, parent: Any, known: list[str]) -> str:
    """The option of that name elsewhere, or a sibling of nearly that name, and all siblings."""
    leaf = key.rpartition(".")[2]
    root = parent._get_root() if isinstance(parent, DictConfig) else None
    elsewhere = [name for name in _dotted(root) if name.rpartition(".")[2] == leaf]
    hint = f" (did you mean {elsewhere[0]!r}?)" if elsewhere else near_match(leaf, known)
    siblings = [name for name in known if not name.startswith(("_", "hydra"))]
    return f"{hint}; known: {', '.join(siblings)}" if siblings else hint


def _dotted(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return []
    found = []
    for key in node:
        if key != "hydra":
            found += [f"{prefix}{key!s}", *_dotted(node._get_node(key), f"{prefix}{key!s}.")]
    return found


def in_one_line(error: BaseException) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split())

"""The runs of a sweep: each in a folder named by what it does, so that a sweep can be begun again.

A run's folder is named by a hash of its resolved configuration, without what changes nothing about
the result. Started again in the same sweep folder, finished runs are left out, interrupted ones go on,
and failed ones are tried anew; one that fails does not stop the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dqss.io import write_text_atomic

FAILED_FILE = "failed.txt"
"""In the folder of a run that was refused: why."""
RESOLVER = "run_hash"
_ELSEWHERE = ("hydra", "run_dir", "resume", "dry_run", "logger")
"""Groups and options that do not change what a run finds."""


def register(free: Iterable[str] = ()) -> None:
    """Make ``${run_hash:}`` known to configurations.

    Args:
        free: further options (``method.max_minutes``) that change nothing about the result.
    """
    left_out = tuple(free)
    OmegaConf.register_new_resolver(
        RESOLVER, lambda *, _root_: run_hash(_root_, left_out), replace=True, use_cache=False
    )


def run_hash(config: DictConfig, free: Iterable[str] = ()) -> str:
    """Twelve hexadecimal digits; the same for configurations that find the same."""
    kept = {
        str(key): OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, value in config.items()
        if key not in _ELSEWHERE
    }
    for path in free:
        _drop(kept, path.split("."))
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _drop(tree: Any, path: list[str]) -> None:
    if isinstance(tree, dict) and path[0] in tree:
        if len(path) == 1:
            del tree[path[0]]
        else:
            _drop(tree[path[0]], path[1:])


class Failures:
    """Runs of this process that failed, so that a sweep ends as a failure although it went on."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, folder: Path, line: str) -> None:
        """Remember, and leave word in the run's folder."""
        self.lines.append(line)
        write_text_atomic(folder / FAILED_FILE, f"{line}\n")


def forgive(folder: Path) -> None:
    """A failed run begins anew."""
    (folder / FAILED_FILE).unlink(missing_ok=True)

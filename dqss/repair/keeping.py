"""Finished units in the run folder, so that none is tuned twice."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from safetensors import SafetensorError

from dqss.io import ensure_folder, write_bytes_atomic
from dqss.repair.reconstruct import Found, UnitErrors
from dqss.repair.units import Unit

FOLDER = "repair"
"""Below the run folder."""


class Kept:
    """What was found of units earlier, a file each.

    Args:
        folder: the run folder; None keeps nothing.
        identity: of everything that a result depends on; files of another are not read.
    """

    def __init__(self, folder: Path | None, identity: str) -> None:
        self.folder = None if folder is None else ensure_folder(folder / FOLDER)
        self.identity = identity

    def get(self, position: int, unit: Unit) -> Found | None:
        """What is there of the unit at ``position``, if it is of the same run and whole."""
        path = self._path(position)
        if path is None or not path.exists():
            return None
        try:
            with safetensors.safe_open(path, "pt") as file:
                noted = json.loads(file.metadata()["unit"])
                name, identity, errors = (noted[key] for key in ("name", "identity", "errors"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError, OSError):
            return None
        if identity != self.identity or name != unit.name:
            return None
        parts: dict[str, dict[str, Any]] = {"codes": {}, "scales": {}}
        for key, tensor in tensors.items():
            kind, _, layer = key.partition(":")
            parts[kind][layer] = tensor
        pairs = {key: tuple(errors[key]) for key in ("learned", "held_out")}
        return Found(parts["codes"], parts["scales"], UnitErrors(**{**errors, **pairs}))

    def put(self, position: int, unit: Unit, found: Found) -> None:
        """Keep what was found, whole or not at all."""
        path = self._path(position)
        if path is None or found.errors is None:
            return
        noted = {"identity": self.identity, "name": unit.name, "errors": asdict(found.errors)}
        tensors = {f"codes:{name}": codes for name, codes in found.codes.items()}
        tensors |= {f"scales:{name}": scale for name, scale in found.scales.items()}
        data = safetensors.torch.save(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, {"unit": json.dumps(noted)}
        )
        write_bytes_atomic(path, data)

    def _path(self, position: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{position:03d}.safetensors"

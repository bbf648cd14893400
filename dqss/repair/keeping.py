"""Finished units in the run folder, so that none is tuned twice."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dqss.io import ensure_folder, write_bytes_atomic
from dqss.repair.found import Found
from dqss.repair.reconstruct import UnitErrors
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

    def get(self, position: int, unit: Unit) -> tuple[Found, UnitErrors] | None:
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
        parts: dict[str, dict[str, Any]] = {field.name: {} for field in fields(Found)}
        for key, tensor in tensors.items():
            kind, _, layer = key.partition(":")
            parts[kind][layer] = tensor
        pairs = {key: tuple(errors[key]) for key in ("learned", "held_out")}
        return Found(**parts), UnitErrors(**{**errors, **pairs})

    def put(self, position: int, unit: Unit, found: Found, errors: UnitErrors) -> None:
        """Keep what was found, whole or not at all."""
        path = self._path(position)
        if path is None:
            return
        noted = {"identity": self.identity, "name": unit.name, "errors": asdict(errors)}
        tensors = {
            f"{field.name}:{name}": tensor.contiguous()
            for field in fields(found)
            for name, tensor in getattr(found, field.name).items()
        }
        data = safetensors.torch.save(tensors, {"unit": json.dumps(noted)})
        write_bytes_atomic(path, data)

    def _path(self, position: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{position:03d}.safetensors"


class KeptSteps:
    """What an optimizer has reached, so that it goes on from there.

    Args:
        folder: the run folder; None keeps nothing.
        identity: of everything that the result depends on.
    """

    def __init__(self, folder: Path | None, identity: str) -> None:
        self.path = None if folder is None else ensure_folder(folder / FOLDER) / "network.safetensors"
        self.identity = identity

    @torch.no_grad()
    def get(self, optimizer: torch.optim.Adam) -> int:
        """Put what is kept into the parameters of ``optimizer`` and into itself.

        Returns:
            How many steps were taken; 0, and nothing changed, where nothing of the same run is kept.
        """
        if self.path is None or not self.path.exists():
            return 0
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                noted = json.loads(file.metadata()["network"])
                if noted["identity"] != self.identity:
                    return 0
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError, OSError):
            return 0
        done = int(noted["done"])
        for place, parameter in enumerate(_parameters(optimizer)):
            parameter.copy_(tensors[f"{place}:value"])
            if f"{place}:{_MOMENTS[0]}" in tensors:
                moments = {key: tensors[f"{place}:{key}"].to(parameter.device) for key in _MOMENTS}
                optimizer.state[parameter] = {"step": torch.tensor(float(done)), **moments}
        return done

    def put(self, optimizer: torch.optim.Adam, done: int) -> None:
        """Keep what was reached after so many steps, whole or not at all."""
        if self.path is None:
            return
        tensors: dict[str, Tensor] = {}
        for place, parameter in enumerate(_parameters(optimizer)):
            state = optimizer.state.get(parameter, {})  # none of what no gradient has reached
            parts = {"value": parameter.detach(), **{key: state[key] for key in _MOMENTS if key in state}}
            tensors |= {f"{place}:{key}": part.cpu().contiguous() for key, part in parts.items()}
        noted = json.dumps({"identity": self.identity, "done": done})
        write_bytes_atomic(self.path, safetensors.torch.save(tensors, {"network": noted}))


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _parameters(optimizer: torch.optim.Adam) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]

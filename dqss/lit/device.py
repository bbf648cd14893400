"""Where a search runs, from the arguments of Lightning's trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dqss.errors import UserError, near_match
from dqss.lit.ranks import local_rank, world_size

ACCELERATORS = ("auto", "cpu", "gpu", "cuda")


def device_of(trainer: Mapping[str, Any]) -> torch.device:
    """The one device that ``trainer.accelerator`` means on this machine."""
    wanted = trainer.get("accelerator", "auto")
    if wanted not in ACCELERATORS:
        hint = near_match(str(wanted), ACCELERATORS)
        raise UserError(f"trainer.accelerator={wanted}{hint}: expected one of {', '.join(ACCELERATORS)}")
    if wanted != "cpu" and torch.cuda.is_available():
        own = local_rank() if world_size() > 1 else torch.cuda.current_device()
        return torch.device("cuda", own)
    if wanted in ("gpu", "cuda"):
        raise UserError(f"trainer.accelerator={wanted}: torch finds no CUDA device; use auto or cpu")
    return torch.device("cpu")

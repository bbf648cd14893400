"""Which of several processes this is, as ``torchrun`` and SLURM's ``srun`` with it say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from dqss.errors import UserError


def rank() -> int:
    """Number of this process; 0 where there is but one."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Number of this process on its machine: that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def check_processes(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of Lightning's trainer for the processes that there are.

    Lightning's own launchers start the whole command again, which would begin searches of its own
    in the same folder: processes are started by ``torchrun``, and all do the same.

    Raises:
        UserError: where more devices are asked for than there are processes.
    """
    devices, nodes = trainer.get("devices", 1), int(trainer.get("num_nodes", 1))
    count = len(devices) if isinstance(devices, list | tuple) else devices
    wanted = nodes * int(count) if str(count).isdigit() else 1
    if world_size() == 1:
        if wanted > 1:
            raise UserError(
                f"trainer.devices={devices}: start so many processes with torchrun --nproc_per_node={count} "
                "-m dqss.search ... and leave out trainer.devices"
            )
        return {"devices": 1}
    if wanted not in (1, world_size()):
        raise UserError(f"trainer.devices={devices}: there are {world_size()} processes; leave it out")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return {
        "devices": local,
        "num_nodes": world_size() // local,
        "strategy": trainer.get("strategy", "ddp"),
    }

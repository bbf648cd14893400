"""Random numbers that are a function of a seed and of names, wherever and whenever they are drawn."""

from __future__ import annotations

import hashlib

import torch


def generator_for(seed: int, *names: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on ``device``, seeded by ``seed`` and ``names`` and nothing else."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)

"""Quantizer modules: a candidate with its parameters, ready to run."""

from __future__ import annotations

from dqss.quantizers.base import Quantizer
from dqss.quantizers.static import StaticQuantizer
from dqss.spec import Candidate


def build(candidate: Candidate, channels: int) -> Quantizer:
    """The module that runs ``candidate`` on a tensor with ``channels`` scales."""
    return StaticQuantizer(candidate, channels)


__all__ = ["Quantizer", "StaticQuantizer", "build"]

"""Networks to search: those of timm and torchvision, the user's own, and small ones of ours."""

from __future__ import annotations

from dqss.models.loaded import InputConfig, LoadedModel

__all__ = ["InputConfig", "LoadedModel"]

"""Bake computed weights (parametrizations, weight norm, spectral norm, pruning) into plain ones."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.prune import remove as remove_pruning
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from dqss.prepare.work import Work


def _bake_parametrizations(module: nn.Module) -> None:
    """Torch's own removal edits the class, which the copy shares with the user's module."""
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    values = {name: getattr(module, name).detach().clone() for name in lists}
    trained = {name: any(p.requires_grad for p in lists[name].parameters()) for name in lists}
    is_parameter = {
        name: any(key.startswith("original") for key, _ in lists[name].named_parameters(recurse=False))
        for name in lists
    }
    module.__class__ = type(module).__bases__[0]
    del module._modules["parametrizations"]
    for name, value in values.items():
        if is_parameter[name]:
            setattr(module, name, nn.Parameter(value, requires_grad=trained[name]))
        else:
            module.register_buffer(name, value)


def _bake_hooks(module: nn.Module) -> bool:
    """Old-style weight norm, spectral norm and pruning: forward pre-hooks that write the weight."""
    found = False
    for hook in list(module._forward_pre_hooks.values()):
        if not isinstance(hook, (WeightNorm, SpectralNorm, BasePruningMethod)):
            continue
        name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
        own = [p for key, p in module.named_parameters(recurse=False) if key.startswith(f"{name}_")]
        trained = any(p.requires_grad for p in own)
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, name)
        else:
            remove_pruning(module, name)  # type: ignore[no-untyped-call]
        getattr(module, name).requires_grad_(trained)
        found = True
    return found


def bake_parametrizations(work: Work, excluded: Collection[str]) -> list[str] | None:
    """Replace weights that are computed from others by their values.

    Covers ``torch.nn.utils.parametrize`` (weight norm, arXiv 1602.07868; spectral norm, arXiv
    1802.05957; any other) and the older hooks of both and of pruning.

    Returns:
        Names that were left as they are, or None if there was nothing to do.
    """
    found = False
    with torch.no_grad():
        for name, module in list(work.model.named_modules()):
            if name in excluded:
                continue
            if is_parametrized(module):
                _bake_parametrizations(module)
                found = True
            found |= _bake_hooks(module)
    return list(excluded) if found else None

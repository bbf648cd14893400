"""Looking at modules and exchanging them: wrappers, plain kinds, one module for another."""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposed: TypeAlias = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Layer: TypeAlias = Convolution | Transposed | nn.Linear
KINDS: dict[type[Layer], int] = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
    nn.Linear: 0,
}
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_STATISTICS = {"weight", "bias", "running_mean", "running_var"}


def plain_kind(module: nn.Module) -> type[Layer] | None:
    """The plain torch class that ``module`` is an instance of, or None."""
    return next((kind for kind in KINDS if isinstance(module, kind)), None)


def groups_of(layer: Layer) -> int:
    """Of a convolution's channels; a linear layer is one group."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def has_own_forward(module: nn.Module) -> bool:
    """Whether a subclass of a plain layer computes something of its own."""
    kind = plain_kind(module)
    return kind is not None and type(module).forward is not kind.forward


def is_batch_norm(module: nn.Module) -> bool:
    """Batch norms of torch and their subclasses, and frozen ones that hold everything as buffers."""
    return isinstance(module, _BatchNorm) or (
        isinstance(getattr(module, "eps", None), float)
        and {name for name, _ in module.named_buffers(recurse=False)} >= _STATISTICS
    )


def _inner(module: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module inside a wrapper that only calls it; None for every other module."""
    # torch.compile's wrapper is known by its attribute: its class would import the compiler.
    key = "_orig_mod" if "_orig_mod" in module._modules else "module"
    if key == "module" and not isinstance(module, (DataParallel, DistributedDataParallel)):
        return None
    inner = module._modules[key]
    assert inner is not None
    return key, inner


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``."""
    while (found := _inner(model)) is not None:
        model = found[1]
    return model


def unwrap_children(model: nn.Module) -> None:
    """Replace wrapped submodules by what they wrap, in place."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and _inner(child) is not None:
                parent._modules[key] = unwrap(child)


def canonical_name(model: nn.Module, name: str) -> str:
    """A state-dict name of ``model`` as it would be without wrapped submodules."""
    kept, module = [], model
    for part in name.split("."):
        found = _inner(module)
        if found is None or found[0] != part:
            kept.append(part)
        child = module._modules.get(part)
        module = nn.Identity() if child is None else child  # below a tensor there is nothing
    return ".".join(kept)


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, also of modules that hold computed tensors (old-style weight norm does)."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put ``new`` in every place of ``old``, with its hooks; returns the model (or ``new``, for the root)."""
    for key in _HOOKS:
        getattr(new, key).update(getattr(old, key))
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return new if model is old else model


def random_probe(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Normal noise of ``shape`` that is the same in every run, in the dtype and place of ``like``."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return noise.to(device=like.device, dtype=like.dtype)

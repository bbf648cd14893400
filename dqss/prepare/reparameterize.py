"""Merge the branches of multi-branch blocks, where the blocks know how to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator

from torch import nn

from dqss.prepare.modules import copy_model
from dqss.prepare.work import Work, reproducible

_METHODS = ("fuse", "reparameterize", "switch_to_deploy")
_TOLERANCE = 1e-3


def _method(module: nn.Module) -> Callable[[], object] | None:
    """The block's own merging method; one that needs arguments is something else."""
    for name in _METHODS:
        method = getattr(module, name, None)
        if inspect.ismethod(method) and all(
            p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            for p in inspect.signature(method).parameters.values()
        ):
            return method
    return None


def _blocks(parent: nn.Module, prefix: str = "") -> Iterator[tuple[nn.Module, str, str]]:
    """Parent, key and full name of each block that can merge; asks for children as they are by then."""
    for key in list(parent._modules):
        child = parent._modules.get(key)
        if child is None:
            continue
        name = f"{prefix}{key}"
        if _method(child) is not None:
            yield parent, key, name
        current = parent._modules.get(key)
        if current is not None:
            yield from _blocks(current, f"{name}.")


def _merge(model: nn.Module, wanted: Callable[[str], bool]) -> list[str]:
    """Merge the wanted blocks in place and return the names of those that fail by themselves."""
    failed = []
    for parent, key, name in _blocks(model):
        block = parent._modules[key]
        method = None if block is None else _method(block)
        if block is None or method is None or not wanted(name):
            continue
        backup = copy_model(block)
        try:
            merged = method()
            if isinstance(merged, nn.Module):
                parent._modules[key] = merged
        except Exception:
            parent._modules[key] = backup
            failed.append(name)
    return failed


def _keep_grad_flags(old: nn.Module, new: nn.Module) -> None:
    """Merging methods detach what they keep; what they make is trained if anything was."""
    flags = {name: p.requires_grad for name, p in old.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(flags.get(name, any(flags.values())))


def reparameterize(work: Work, excluded: Collection[str]) -> list[str] | None:
    """Call ``fuse()``, ``reparameterize()`` or ``switch_to_deploy()`` of blocks that have one.

    RepVGG (arXiv 2101.03697), MobileOne (arXiv 2206.04040), FastViT and their like. Blocks that
    fail or that change the output by more than 1e-3 stay as they are, with a note.

    Returns:
        Names of blocks that were left, or None if nothing was merged.
    """
    names = [name for _, _, name in _blocks(work.model) if name not in excluded]
    if not names:
        return None
    left = set(excluded)

    def merged(wanted: Callable[[str], bool]) -> tuple[nn.Module, list[str]]:
        trial = copy_model(work.model)
        with reproducible(trial):
            failed = _merge(trial, wanted)
        return trial.eval(), failed

    trial, failed = merged(lambda name: name not in left)
    left.update(failed)
    if not work.replay and not work.verifies(trial, _TOLERANCE):
        for name in names:
            alone, _ = merged(lambda other, name=name: other == name)  # type: ignore[misc]
            if not work.verifies(alone, _TOLERANCE):
                left.add(name)
        trial, failed = merged(lambda name: name not in left)
        left.update(failed)
        if not work.verifies(trial, _TOLERANCE):
            left.update(names)
    new = sorted(left - set(excluded))
    if new:
        work.notes.append(f"not reparameterized, the output would change: {', '.join(new)}")
    if left >= set(names):
        return None
    _keep_grad_flags(work.model, trial)
    work.model = trial
    return sorted(left)

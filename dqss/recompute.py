"""Trading time for memory: activations inside a block are computed anew on the way back.

What a block keeps for the backward pass is then its input alone (gradient checkpointing,
arXiv 1604.06174). Nothing is traced: the forward of the chosen modules goes through
:func:`torch.utils.checkpoint.checkpoint`, as an attribute of the module, which is taken away again.

The gradients stay the same, since everything that a forward pass depends on is fixed until the
backward pass is through: weights and grids are frozen, the noise of the decisions is drawn once a step,
and the quantizers' mode, which has changed by then, is put back for as long as the block runs again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dqss.errors import UserError, near_match
from dqss.mixed import MixedQuantizer, Mode
from dqss.supernet import Supernet

AUTO: Final = "auto"
"""In place of patterns: the blocks that a network repeats."""

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks(supernet: Supernet, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that ``patterns`` mean, outermost ones only, in the order of the network.

    Args:
        supernet: whose network is looked at.
        patterns: shell patterns of module names, or :data:`AUTO` for the children of containers
            (``Sequential``, ``ModuleList``, ``ModuleDict``) whose class occurs among such children
            more than once, and which are not containers themselves. Only modules that can be called
            and have layers or products under search inside count.

    Raises:
        UserError: for a pattern that matches no such module.
    """
    if not patterns:
        return {}
    inside = [*supernet.layers, *supernet.products]
    found = {
        name: module
        for name, module in supernet.model.named_modules()
        if name and _can_be_called(module) and any(one.startswith(f"{name}.") for one in inside)
    }
    repeated = _repeated(supernet.model, found)
    chosen: set[str] = set()
    for pattern in patterns:
        matched = repeated if pattern == AUTO else {name for name in found if fnmatchcase(name, pattern)}
        if not matched:
            raise UserError(_nothing(pattern, found))
        chosen |= matched
    outermost = {name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen)}
    return {name: module for name, module in found.items() if name in outermost}


@contextmanager
def recomputing(supernet: Supernet, patterns: Sequence[str]) -> Iterator[None]:
    """Inside, activations of :func:`blocks` are computed anew on the way back; ``()`` changes nothing.

    Only calls that record gradients are concerned. Their backward pass must be over before decisions are
    relaxed or drawn anew, or logits are moved: it would compute other activations than there were.
    """
    with ExitStack() as stack:
        for module in blocks(supernet, patterns).values():
            stack.enter_context(_recomputed(module))
        yield


@contextmanager
def _recomputed(module: nn.Module) -> Iterator[None]:
    own = vars(module).get("forward")  # someone may have put one there already
    forward: Callable[..., Any] = module.forward
    quantizers = [part for part in module.modules() if isinstance(part, MixedQuantizer)]

    def again(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        modes = [(quantizer, quantizer.mode) for quantizer in quantizers]

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _in_modes(modes)

        call = partial(forward, **kwargs)  # whose names may be those of checkpoint's own arguments
        return checkpoint(call, *args, use_reentrant=False, context_fn=contexts)

    module.forward = again
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def _in_modes(modes: Sequence[tuple[MixedQuantizer, Mode]]) -> Iterator[None]:
    before = [quantizer.mode for quantizer, _ in modes]
    for quantizer, mode in modes:
        quantizer.mode = mode
    try:
        yield
    finally:
        for (quantizer, _), mode in zip(modes, before, strict=True):
            quantizer.mode = mode


def _repeated(model: nn.Module, found: dict[str, nn.Module]) -> set[str]:
    children = {
        name: type(found[name])
        for name in found
        if isinstance(model.get_submodule(name.rpartition(".")[0]), _CONTAINERS)
        and not isinstance(found[name], _CONTAINERS)
    }
    count = Counter(children.values())
    return {name for name, kind in children.items() if count[kind] > 1}


def _can_be_called(module: nn.Module) -> bool:
    """Containers without a forward of their own cannot."""
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _nothing(pattern: str, found: dict[str, nn.Module]) -> str:
    if pattern == AUTO:
        example = f"such as [{next(iter(found))}]" if found else "if there are any"
        return f"method.recompute={AUTO}: the network repeats no block; name modules, {example}"
    hint = near_match(pattern, found)
    return f"method.recompute: no module with layers under search inside matches {pattern!r}{hint}"

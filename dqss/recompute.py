"""Trading time for memory: activations inside a block are computed anew on the way back.

What a block keeps for the backward pass is then its input alone (gradient checkpointing,
arXiv 1604.06174). Nothing is traced: the forward of the chosen modules goes through
:func:`torch.utils.checkpoint.checkpoint`, as an attribute of the module, which is taken away again.

The gradients stay the same, since everything that a forward pass depends on is fixed until the
backward pass is through: weights and grids are frozen, the noise of the decisions is drawn once a step,
and the quantizers' mode, which has changed by then, is put back for as long as the block runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dqss.blocks import find_blocks
from dqss.mixed import MixedQuantizer, Mode
from dqss.supernet import Supernet


def blocks(supernet: Supernet, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that ``patterns`` mean; see :func:`dqss.blocks.find_blocks`.

    Raises:
        UserError: for a pattern that matches no such module.
    """
    return find_blocks(supernet.model, [*supernet.layers, *supernet.products], patterns, "method.recompute")


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

"""Inputs between inputs: a few hundred are soon known by heart, and the float network answers for any.

Weighted means of two inputs, as in mixup (arXiv 1710.09412); the float network's own output for them is
what is wanted, as in arXiv 2106.05237, and no label.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


def can_blend(inputs: Any) -> bool:
    """Whether all tensors of a batch hold real numbers: between two words there is none."""
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return bool(leaves) and all(leaf.is_floating_point() for leaf in leaves)


def blend(inputs: Any, size: int, generator: torch.Generator) -> Any:
    """Each of a batch mixed with another of it, in shares that are drawn evenly from [0, 1].

    Args:
        inputs: tree of tensors ``[size, ...]``; as it is where :func:`can_blend` says no.
        size: inputs in the batch.
        generator: on the CPU.
    """
    if not can_blend(inputs):
        return inputs
    partner = torch.randperm(size, generator=generator)
    share = torch.rand(size, generator=generator)

    def mixed(leaf: Tensor) -> Tensor:
        own = share.to(leaf).reshape(-1, *[1] * (leaf.ndim - 1))
        return own * leaf + (1 - own) * leaf[partner.to(leaf.device)]

    return tree_map_only(Tensor, mixed, inputs)

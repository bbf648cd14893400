"""As many bits as uniform strategies have, in the mean: what searches that move bits may spend."""

from __future__ import annotations

from collections.abc import Collection
from operator import mul

import torch
from torch import Tensor, nn

from dqss.budget import Budget

EDGE_BITS = 8


def same_mean(
    model: nn.Module,
    example: Tensor,
    bits: tuple[int, int],
    edges: Collection[str],
    edge_bits: int = EDGE_BITS,
) -> Budget:
    """Over all weights, and all inputs for an ``example``; layers in ``edges`` have ``edge_bits``."""
    sizes: dict[str, list[int]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, name=name: sizes.update({name: [module.weight.numel(), args[0].numel()]})
        )
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    means = [
        sum(map(mul, (edge_bits if name in edges else most for name in sizes), values)) / sum(values)
        for most, values in zip(bits, zip(*sizes.values(), strict=True), strict=True)
    ]
    return Budget(average_weight_bits=means[0], average_activation_bits=means[1])

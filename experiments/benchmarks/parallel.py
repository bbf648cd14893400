"""The supernet that DARTS would build: one layer for each candidate, side by side.

    y = sum_k softmax(p)_k layer(R_k(x); Q_k(W))

Candidate k quantizes weight and input alike by its k-th algorithm, so K convolutions do what one
does in :mod:`dqss.mixing`, and one decision takes the place of two. To its advantage, the K
weights are quantized once and for all, and inputs by the same fused loops as elsewhere: what it
costs more is the convolutions, and the K results that wait for the way back.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dqss.attach import detach_input, detach_weight
from dqss.supernet import SearchableLayer, Supernet


class ParallelLayer(nn.Module):
    """K copies of a layer with weights and input quantizers of their own, mixed by their results.

    Args:
        layer: convolution or linear layer, frozen.
        weights: ``[K, ...]``, a quantized weight for each candidate.
        inputs: K modules that quantize what the layer takes.
    """

    weights: Tensor

    def __init__(self, layer: nn.Module, weights: Tensor, inputs: nn.ModuleList) -> None:
        super().__init__()
        if len(weights) != len(inputs):
            raise ValueError(f"{len(weights)} weights for {len(inputs)} input quantizers")
        self.layer, self.inputs = layer, inputs
        self.register_buffer("weights", weights)
        self.logits = nn.Parameter(torch.zeros(len(inputs), device=weights.device))

    def forward(self, x: Tensor) -> Tensor:
        """The mean of the K results at the probabilities of the logits."""
        shares = torch.softmax(self.logits, 0).unbind()
        results = (
            functional_call(self.layer, {"weight": weight}, (quantize(x),))
            for weight, quantize in zip(self.weights, self.inputs, strict=True)
        )
        return reduce(torch.add, (share * result for share, result in zip(shares, results, strict=True)))


def parallelize(supernet: Supernet) -> nn.Module:
    """Put K parallel layers in the place of every layer of a calibrated supernet; it is used up.

    Raises:
        ValueError: for a layer with another number of candidates for its weight than for its input.
    """
    for name, found in supernet.layers.items():
        parent, _, attribute = name.rpartition(".")
        setattr(supernet.model.get_submodule(parent), attribute, _parallel(name, found))
    return supernet.model


def _parallel(name: str, found: SearchableLayer) -> ParallelLayer:
    weight, activation = found.weight, found.activation
    if weight is None or activation is None:
        raise ValueError(f"layer {name!r}: weight and input have to be searched both")
    weights = torch.stack([weight.stack.choose(k) for k in range(len(weight.candidates))])
    detach_weight(found.module)
    detach_input(found.module)
    return ParallelLayer(found.module, weights, activation.candidates)


def logits_of(model: nn.Module) -> list[nn.Parameter]:
    """What learns in a network of parallel layers."""
    return [module.logits for module in model.modules() if isinstance(module, ParallelLayer)]

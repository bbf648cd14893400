"""The networks of the benchmarks: random weights, random inputs; only shapes matter for time and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dqss.models.factory import cifar_resnet, timm_model
from dqss.models.loaded import LoadedModel
from dqss.models.super_resolution import super_resolution

SETTLING = 3
"""Batches that the batch norms see before anything is measured."""


@dataclass(frozen=True)
class Network:
    """How to make a network, and what it takes.

    Attributes:
        load: gives the network.
        size: pixels a side.
        title: in tables.
        peak: value of white where the inputs are pictures from black to white; None for normal noise.
    """

    load: Callable[[], LoadedModel]
    size: int
    title: str
    peak: float | None = None

    def inputs(self, count: int, seed: int = 0) -> Tensor:
        """Random images ``[count, 3, size, size]``."""
        generator = torch.Generator().manual_seed(seed)
        if self.peak is not None:
            return self.peak * torch.rand(count, 3, self.size, self.size, generator=generator)
        return torch.randn(count, 3, self.size, self.size, generator=generator)

    def build(self, batch: int = 8) -> nn.Module:
        """The network in ``eval()``, its batch norms at the statistics of random inputs.

        As they are at the start, some networks' activations fade from layer to layer, and numbers
        near zero take other paths through the arithmetic than those of a trained network.
        """
        torch.manual_seed(0)
        model: nn.Module = self.load().module
        settle(model, [self.inputs(batch, seed) for seed in range(1, 1 + SETTLING)])
        return model


@torch.no_grad()
def settle(model: nn.Module, batches: list[Tensor]) -> None:
    """Set all batch norms to the mean statistics of ``batches``; leaves the model in ``eval()``.

    Norms that begin with a factor of zero, to leave their branch out at first, get a factor of one.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        if not bool(norm.weight.any()):
            norm.weight.fill_(1.0)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    model.train()
    for batch in batches:
        model(batch)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


NETWORKS = {
    "resnet18": Network(lambda: timm_model("resnet18"), 224, "ResNet-18"),
    "mobilenetv2": Network(lambda: timm_model("mobilenetv2_100"), 224, "MobileNetV2"),
    "resnet20": Network(lambda: cifar_resnet("resnet20"), 32, "ResNet-20"),
    "vit_tiny": Network(lambda: timm_model("vit_tiny_patch16_224"), 224, "ViT-Tiny"),
    "rlfn": Network(lambda: super_resolution("rlfn", 4), 48, "RLFN x4", peak=255.0),
    "ditn": Network(lambda: super_resolution("ditn_real", 4), 48, "DITN-Real x4", peak=1.0),
}

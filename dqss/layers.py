"""Which modules of a network can be searched, and what their axes mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dqss.space import LayerInfo

_CONVOLUTIONS: tuple[tuple[type[nn.Module], int, bool], ...] = (
    (nn.Conv1d, 1, False),
    (nn.Conv2d, 2, False),
    (nn.Conv3d, 3, False),
    (nn.ConvTranspose1d, 1, True),
    (nn.ConvTranspose2d, 2, True),
    (nn.ConvTranspose3d, 3, True),
)


def describe(name: str, layer: nn.Module) -> LayerInfo | None:
    """Axes and types of a searchable layer; None for every other module.

    A grouped transposed convolution shares scales between groups: its weight is
    ``[in, out / groups, ...]``, and the scales lie along axis 1.
    """
    if not isinstance(getattr(layer, "weight", None), Tensor):
        return None
    types = tuple(kind.__name__ for kind in type(layer).__mro__ if issubclass(kind, nn.Module))
    if isinstance(layer, nn.Linear):
        return LayerInfo(name, types, weight_axis=0, input_axis=-1)
    for kind, dims, transposed in _CONVOLUTIONS:
        if isinstance(layer, kind):
            return LayerInfo(name, types, weight_axis=1 if transposed else 0, input_axis=-dims - 1)
    return None


def input_shape(layer: nn.Module, info: LayerInfo) -> torch.Size:
    """A shape of the layer's input, right from its channel axis on: the other axes are 1."""
    channels: int = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels  # type: ignore[assignment]
    return torch.Size([channels] + [1] * (-info.input_axis - 1))


def searchable_layers(model: nn.Module) -> dict[str, tuple[nn.Module, LayerInfo]]:
    """Every searchable layer by name, in the order of ``named_modules``, each module once."""
    found = {}
    for name, module in model.named_modules():
        info = describe(name, module)
        if info is not None:
            found[name] = (module, info)
    return found

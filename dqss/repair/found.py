"""What repair has learned of some layers, and how it gets into a network and out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dqss.attach import INPUT_QUANTIZER
from dqss.mixing import Codes, Grid
from dqss.quantizers import Quantizer


@dataclass(frozen=True)
class Found:
    """What was learned, by layer, on the CPU.

    Attributes:
        codes: integer codes of weights, in their shapes.
        scales: steps ``[C]`` of inputs, where they learned.
        weight_scales: steps ``[C]`` of weights, where they learned.
        biases: ``[C]``, where they learned.
    """

    codes: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    weight_scales: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)

    def regrid(self, name: str, grid: Grid) -> Grid:
        """That of a layer's weight, with the step that was learned, if it was."""
        scale = self.weight_scales.get(name)
        return grid if scale is None else replace(grid, scale=scale.to(grid.scale))


def input_quantizers(network: nn.Module, roots: Iterable[str] = ("",)) -> dict[str, Quantizer]:
    """Those of the inputs of all layers below ``roots``, by the layer's name."""
    found = {}
    for root in roots:
        for name, module in network.get_submodule(root).named_modules(prefix=root):
            quantizer = getattr(module, INPUT_QUANTIZER, None)
            if isinstance(quantizer, Quantizer):
                found[name] = quantizer
    return found


@torch.no_grad()
def put(network: nn.Module, found: Found, grids: Mapping[str, Grid]) -> Callable[[], None]:
    """Put what was found into a network.

    Args:
        network: the quantized one, whose layers have plain weights and quantizers of inputs.
        found: of some of its layers.
        grids: of the weights that have codes.

    Returns:
        What undoes it.
    """
    undo: list[Callable[[], None]] = []

    def exchange(layer: nn.Module, part: str, value: Tensor) -> None:
        earlier: Tensor = getattr(layer, part)
        undo.append(lambda: setattr(layer, part, earlier))
        setattr(layer, part, nn.Parameter(value.to(earlier), requires_grad=False))

    def regrid(quantizer: Quantizer, scale: Tensor) -> None:
        grid = quantizer.grid()
        before = grid.scale.clone(), grid.zero_point.clone()
        undo.append(lambda: quantizer.load_grid(*before))
        quantizer.load_grid(scale, before[1])

    for name, integers in found.codes.items():
        layer, grid = network.get_submodule(name), found.regrid(name, grids[name])
        exchange(layer, "weight", Codes(integers.to(grid.scale.device), grid).dequantize())
    for name, bias in found.biases.items():
        exchange(network.get_submodule(name), "bias", bias)
    for name, scale in found.scales.items():
        regrid(getattr(network.get_submodule(name), INPUT_QUANTIZER), scale)

    def undo_all() -> None:
        for step in undo:
            step()

    return undo_all

"""How large a file is, beside the float network and beside what its strategy lets one expect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from dqss.arithmetic.codes import CodeKernel
from dqss.arithmetic.kernels import LayerKernel
from dqss.arithmetic.points import IntegerPoint
from dqss.choice import TensorChoice
from dqss.quantizers import Quantizer
from dqss.strategy import Strategy

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Sizes:
    """Bytes.

    Attributes:
        file: the ONNX file.
        floating: the parameters and buffers of the float network at four bytes each.
        estimate: quantized weights at their bits, with a scale a channel or group (and a zero point as
            wide as a weight, if affine), and everything else at four bytes.
    """

    file: int
    floating: int
    estimate: int

    def summary(self) -> dict[str, int]:
        """As JSON."""
        return {"file": self.file, "float": self.floating, "estimate": self.estimate}

    def __str__(self) -> str:
        return (
            f"{self.file / 1e6:.2f} MB: {self.file / self.floating:.3f} of the float weights "
            f"({self.floating / 1e6:.2f} MB); {self.estimate / self.floating:.3f} by its bits alone"
        )


def sizes_of(file: int, simulation: nn.Module, strategy: Strategy, scales: Mapping[str, int]) -> Sizes:
    """Compare a file's size.

    Args:
        file: bytes.
        simulation: from :func:`dqss.apply.apply_strategy`.
        strategy: that was applied.
        scales: how many a quantizer has, by its name.
    """
    second = {name for names in strategy.ties for name in names[1:]}  # the same weight again
    quantized, replaced, kept = set[int](), 0, 0.0
    modules = dict(simulation.named_modules())
    for name, layer in strategy.layers.items():
        weight = modules[name].weight
        if layer.weight is not None and isinstance(weight, Tensor):
            quantized.add(id(weight))
            if name not in second:
                replaced += weight.numel() * FLOAT_BYTES
                kept += _bytes(layer.weight, weight.numel(), scales[f"{name}.weight"])
    whole = (
        sum(tensor.numel() for tensor in _tensors(simulation) if id(tensor) not in quantized) * FLOAT_BYTES
    )
    return Sizes(file, whole + replaced, round(whole + kept))


def _bytes(choice: TensorChoice, values: int, scales: int) -> float:
    per_scale = FLOAT_BYTES + (0 if choice.symmetric else choice.bits / 8)
    return values * choice.bits / 8 + scales * per_scale


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and floating-point buffers, without those of quantizers and kernels."""
    yield from model.parameters()
    kinds = (Quantizer, CodeKernel, LayerKernel, IntegerPoint)
    ours = {id(b) for module in model.modules() if isinstance(module, kinds) for b in module.buffers()}
    yield from (b for b in model.buffers() if b.is_floating_point() and id(b) not in ours)

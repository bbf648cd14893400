"""The arithmetics that there are. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class FakeQuantized:
    """Real numbers, rounded to their grids: what a search looks at, on every target."""

    def __str__(self) -> str:
        return "fake quantization"


@dataclass(frozen=True)
class IntegerKernels:
    """Integers, as the kernels of ONNX Runtime for x86 compute with them.

    Convolutions and linear layers sum products of codes, which is exact in whatever order, add a bias
    in whole units of that sum, and scale it once to the grid of what reads it; additions of two grids
    and averages likewise. What no such kernel computes stays in real numbers.

    Attributes:
        weight_bits: of the integers that weights are stored in; narrower ones stand at their upper end.
    """

    weight_bits: int = 8

    def __str__(self) -> str:
        return "integer arithmetic"


@dataclass(frozen=True)
class ExactSums:
    """Codes held in fp32, summed without any rounding; then operations of one rounding each.

    Convolutions and linear layers sum products of codes, which fp32 does exactly up to 2^24 (beyond it
    digits of the weights are summed apart), multiply the sum with ``scale * scale``, and add their bias.
    Averages over an image are added up in a stated order. That is the same in whatever runtime, on any
    machine with IEEE 754 arithmetic. What has no exact result, as softmax and layer norms, is computed in
    fp64 and rounded to fp32 once, on which runtimes agree but for a rare value
    (:mod:`dqss.arithmetic.doubles`).
    What is neither that nor elementwise stays as it was.
    """

    def __str__(self) -> str:
        return "exact sums"


Arithmetic: TypeAlias = FakeQuantized | IntegerKernels | ExactSums

FAKE_QUANTIZED = FakeQuantized()
"""The default: what was searched, bit for bit."""
ONNXRUNTIME = IntegerKernels()
"""Of ``target=onnxruntime-cpu``."""
EXACT = ExactSums()
"""Of files for ``target=generic``."""

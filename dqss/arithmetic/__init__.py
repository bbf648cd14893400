"""What a quantized network is simulated with: real numbers on grids, exact sums, or a runtime's integers."""

from dqss.arithmetic.kinds import (
    EXACT,
    FAKE_QUANTIZED,
    ONNXRUNTIME,
    Arithmetic,
    ExactSums,
    FakeQuantized,
    IntegerKernels,
)

__all__ = [
    "EXACT",
    "FAKE_QUANTIZED",
    "ONNXRUNTIME",
    "Arithmetic",
    "ExactSums",
    "FakeQuantized",
    "IntegerKernels",
]

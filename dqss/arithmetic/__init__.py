"""What numbers a quantized network is simulated with: real ones on grids, or a runtime's own integers."""

from dqss.arithmetic.kinds import FAKE_QUANTIZED, ONNXRUNTIME, Arithmetic, FakeQuantized, IntegerKernels

__all__ = ["FAKE_QUANTIZED", "ONNXRUNTIME", "Arithmetic", "FakeQuantized", "IntegerKernels"]

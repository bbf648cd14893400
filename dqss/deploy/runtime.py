"""ONNX Runtime on the CPU: sessions, and which kernels one really uses."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from torch import Tensor

from dqss.deploy.grids import Array
from dqss.errors import ExportError

INTEGER_KERNELS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)
"""What multiplies and adds integers."""
FLOAT_KERNELS = frozenset(
    {
        "Conv",
        "ConvTranspose",
        "Einsum",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "Gemm",
        "MatMul",
        "MatMulNBits",
    }
)
"""What multiplies real numbers; ``MatMulNBits`` reads integer weights and turns them back as it goes."""


def open_session(data: bytes, threads: int = 1, optimized: Path | None = None) -> ort.InferenceSession:
    """A session on a model in memory, with every optimization that a user gets by default.

    Args:
        data: the serialized model.
        threads: within an operator.
        optimized: where the graph that really runs is written to, but for the layout of its tensors.

    Raises:
        ExportError: where the runtime refuses the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # it warns about files for this machine alone, which is what is asked for
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        # What comes behind that changes layouts, and makes convolutions of multiplications.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        words = " ".join(str(error).split())[:200]
        raise ExportError(f"onnxruntime {ort.__version__} does not take the model: {words}") from error


def run_session(session: ort.InferenceSession, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs by name; feeds that the model does not have are left out."""
    known = {entry.name for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    results = session.run(names, {name: value for name, value in feeds.items() if name in known})
    return dict(zip(names, results, strict=True))


def feeds_of(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Array]:
    """The inputs of a model by name."""
    pairs = zip(names, tensors, strict=True)
    return {name: np.ascontiguousarray(tensor.detach().cpu().numpy()) for name, tensor in pairs}


@dataclass(frozen=True)
class Kernels:
    """How many convolutions and matrix products run in which kernels.

    Attributes:
        integer: those that multiply integers, by the kernel's name.
        floating: those that multiply real numbers.
    """

    integer: Counter[str] = field(default_factory=Counter)
    floating: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        integer, floating = self.integer.total(), self.floating.total()
        named = ", ".join(f"{count} {name}" for name, count in sorted((self.integer + self.floating).items()))
        return f"{integer} of {integer + floating} convolutions and matrix products in integers ({named})"


def kernels_of(data: bytes) -> Kernels:
    """Ask the runtime what it makes of a model."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "optimized.onnx")
        open_session(data, optimized=file)
        nodes = onnx.load(file).graph.node
    found = Counter[str](_all_ops(nodes))
    return Kernels(
        *(Counter({k: n for k, n in found.items() if k in kind}) for kind in (INTEGER_KERNELS, FLOAT_KERNELS))
    )


def _all_ops(nodes: Any) -> list[str]:
    """Also those of subgraphs."""
    found = []
    for node in nodes:
        found.append(node.op_type)
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                found += _all_ops(graph.node)
    return found

"""Single integer kernels of ONNX Runtime, which is the reference here."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from dqss.arithmetic.numbers import Bytes


def scalars(grid: Bytes, name: str) -> dict[str, np.ndarray[Any, Any]]:
    return {f"{name}_scale": grid.scale.numpy(), f"{name}_zero": np.array(int(grid.zero), np.uint8)}


def run(
    op: str,
    feeds: dict[str, Tensor],
    inputs: list[str],
    constants: dict[str, np.ndarray[Any, Any]],
    domain: str = "",
    output: int = TensorProto.UINT8,
    **attributes: Any,
) -> np.ndarray[Any, Any]:
    """The output of one node, whose ``inputs`` are among feeds (as bytes) and constants, or empty."""
    node = helper.make_node(op, inputs, ["y"], domain=domain, **attributes)
    entries = [helper.make_tensor_value_info(n, TensorProto.UINT8, [None] * x.ndim) for n, x in feeds.items()]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    out = helper.make_tensor_value_info("y", output, None)
    graph = helper.make_graph([node], "one", entries, [out], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: x.numpy().astype(np.uint8) for name, x in feeds.items()})[0]
    assert isinstance(found, np.ndarray) and isinstance(model, onnx.ModelProto)
    return found

"""Biases in the integers of the accumulator, for kernels that add them there.

A kernel that multiplies integers sums ``(a - z_a) w`` in 32 bits, in units of ``s_a s_w``; a bias in
the same units joins the sum (arXiv 1712.05877, section 2.4). ONNX Runtime rounds the bias of a
convolution like that by itself where an integer kernel can follow: one in whole units stays what it is,
and its scales need not be stored, unless it has more digits than float32. That of a ``Gemm`` whose
output stays in float it takes in integers only if it is stored so.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dqss.arithmetic.weights import BIAS_LIMIT
from dqss.deploy.graphs import constant
from dqss.deploy.grids import Array

ROUNDING = 2.0**-23
FOUND_AGAIN = 2**22
"""Whole units up to which rounding a bias and a quotient to float32 leaves no doubt about them."""


def quantize_biases(model: ir.Model) -> int:
    """Store biases beside 8-bit integers as int32, in place.

    That of every ``Gemm``, and that of a ``Conv`` if it is in whole units already, and in more than a
    runtime would find again by itself. Biases that would not fit, and those of layers with a float input,
    stay as they are.

    Returns:
        How many were stored so.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type in ("Conv", "Gemm") and len(node.inputs) == 3:
            count += _quantize_bias(model.graph, node)
    return count


def _quantize_bias(graph: ir.Graph, node: ir.Node) -> bool:
    bias = node.inputs[2]
    scales = [_scale(value) for value in node.inputs[:2]]
    if bias is None or bias.const_value is None or scales[0] is None or scales[1] is None:
        return False
    if scales[0].ndim or node.attributes.get_float("beta", 1.0) != 1.0:
        return False
    values = bias.const_value.numpy()
    scale: Array = (scales[0] * scales[1]).astype(np.float32)
    if scale.shape not in ((), values.shape) or not np.all(scale > 0):
        return False
    codes = np.rint(values.astype(np.float64) / scale)
    largest = np.abs(codes).max(initial=0)
    if node.op_type == "Conv":
        whole = _nearly(codes * scale.astype(np.float64), values)
        if not whole or largest <= FOUND_AGAIN:
            return False
    if values.ndim != 1 or largest > BIAS_LIMIT:
        return False
    inputs = [
        constant(graph, f"{node.name}.bias.codes", codes.astype(np.int32)),
        constant(graph, f"{node.name}.bias.scale", scale),
    ]
    attributes = {"axis": 0} if scale.ndim else {}
    output = ir.Value(name=f"{node.name}.bias", shape=bias.shape, type=bias.type)
    made = ir.node(
        "DequantizeLinear", inputs, attributes, outputs=[output], name=f"{node.name}.bias.DequantizeLinear"
    )
    made.metadata_props.update(node.metadata_props)
    graph.insert_before(node, made)
    node.replace_input_with(2, output)
    return True


def _nearly(found: Array, values: Array) -> bool:
    """Whether that is nothing but the rounding of fp32."""
    return bool(np.all(np.abs(found - values) <= np.abs(values) * ROUNDING))


def _scale(value: ir.Value | None) -> Array | None:
    """The scale of a tensor that comes out of integers of eight bits: a scalar, or one a channel."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or "block_size" in node.attributes:
        return None
    integers, scale = node.inputs[:2]
    if integers is None or integers.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
        return None
    constant = None if scale is None else scale.const_value
    return None if constant is None else constant.numpy()

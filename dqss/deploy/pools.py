"""Means over a whole image as the operator that runtimes have an integer kernel for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dqss.deploy.graphs import append, constant


def pool_means(model: ir.Model) -> int:
    """``GlobalAveragePool`` for every ``ReduceMean`` over all axes behind the channels, in place.

    Only where it reads integers: a kernel for them takes the place of the whole then.

    Returns:
        How many there were.
    """
    found = [node for node in model.graph if _is_global(node)]
    for node in found:
        x, old = node.inputs[0], node.outputs[0]
        assert x is not None and x.shape is not None
        made: list[ir.Node] = []
        result = append(made, "GlobalAveragePool", [x], f"{node.name}.pooled")
        if not node.attributes.get_int("keepdims", 1):
            result.type, result.shape = old.type, ir.Shape([*x.shape[:2], *[1] * (len(x.shape) - 2)])
            axes = constant(model.graph, f"{node.name}.axes", np.arange(2, len(x.shape)))
            result = append(made, "Squeeze", [result, axes], f"{node.name}.squeezed")
        result.type, result.shape = old.type, old.shape
        for fresh in made:
            fresh.metadata_props.update(node.metadata_props)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], made, [old], [result])
    return len(found)


def _is_global(node: ir.Node) -> bool:
    if node.op_type != "ReduceMean" or len(node.inputs) != 2:
        return False
    x, axes = node.inputs
    producer = None if x is None else x.producer()
    if x is None or axes is None or x.shape is None or axes.const_value is None or producer is None:
        return False
    rank = len(x.shape)
    over = {int(axis) % rank for axis in axes.const_value.numpy().reshape(-1)}
    return producer.op_type == "DequantizeLinear" and rank > 2 and over == set(range(2, rank))

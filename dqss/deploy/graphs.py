"""Small helpers to write graphs with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from dqss.deploy.grids import Array


def constant(graph: ir.Graph, name: str, values: Array) -> ir.Value:
    """An initializer; the same one for a name that is there already."""
    if name not in graph.initializers:
        # What is contiguous has an axis at least, and a scalar must stay one.
        tensor = ir.tensor(np.ascontiguousarray(values).reshape(values.shape), name=name)
        shape = ir.Shape(values.shape)
        graph.register_initializer(
            ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return graph.initializers[name]


def append(
    made: list[ir.Node],
    op: str,
    inputs: Sequence[ir.Value | None],
    output: str,
    attributes: Mapping[str, Any] | None = None,
) -> ir.Value:
    """Add a node of one output, which is returned, to ``made``; both are named after it."""
    value = ir.Value(name=output)
    made.append(ir.node(op, inputs, attributes or {}, outputs=[value], name=f"{output}.{op}"))
    return value


def transposes_of(value: ir.Value) -> Iterator[ir.Node]:
    """What exchanges the axes of a matrix."""
    for user in list(value.consumers()):
        if user.op_type == "Transpose" and list(user.attributes.get_ints("perm", ())) == [1, 0]:
            yield user

"""Functions of a graph in fp64, rounded to fp32 once, as :mod:`dqss.arithmetic.doubles` computes them.

``Cast``, the operator, ``Cast``. ONNX Runtime has no ``Gelu`` and no ``Erf`` of fp64: these are written
out as the formula of :mod:`dqss.arithmetic.erfc`. So are layer norms, whose statistics the standard has in
fp32 at the most. Parameters stay in fp32 in the file.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from dqss.arithmetic.erfc import COEFFICIENTS, ROOT_HALF, TANH_CUBE, TANH_SCALE
from dqss.deploy.exact import put
from dqss.deploy.graphs import append, constant

_SAME = ("Softmax", "LogSoftmax", "LayerNormalization", "Sigmoid", "Tanh", "Exp", "MatMul", "Gemm", "Einsum")
_FLOAT, _DOUBLE = int(ir.DataType.FLOAT), int(ir.DataType.DOUBLE)


def widen(graph: ir.Graph, exact: Collection[ir.Node]) -> int:
    """Compute whatever is rounded in more ways than one in fp64, in place.

    Args:
        graph: without named nodes.
        exact: sums of codes, which stay.

    Returns:
        How many nodes there were.
    """
    found = [node for node in graph if node not in exact and _is_wanted(node)]
    for node in found:
        _Wide(graph, node).replace()
    return len(found)


def _is_wanted(node: ir.Node) -> bool:
    first = node.inputs[0] if node.inputs else None
    real = first is not None and first.dtype in (None, ir.DataType.FLOAT)
    # The statistics of a layer norm, which hardly anything reads.
    single = not any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    return real and single and not node.domain and node.op_type in (*_SAME, "Gelu", "Erf")


def _normed(node: ir.Node) -> list[int]:
    """The axes that a layer norm is over: all from one on. Its weight has just these."""
    weight = node.inputs[1]
    assert weight is not None and weight.shape is not None
    return list(range(-len(weight.shape), 0))


class _Wide:
    """One node's replacement."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node, self.made = graph, node, list[ir.Node]()

    def replace(self) -> None:
        inputs = [
            None if x is None else self._do("Cast", x, word=f"wide{n}", to=_DOUBLE)
            for n, x in enumerate(self.node.inputs)
        ]
        result = self._of(*inputs)
        put(self.graph, self.node, self.made, self._do("Cast", result, word="rounded", to=_FLOAT))

    def _of(self, *inputs: ir.Value | None) -> ir.Value:
        op, x = self.node.op_type, inputs[0]
        assert x is not None
        if op == "Erf":
            left = self._do("Sub", self._number(1.0), self._erfc(self._do("Abs", x)))
            return self._do("Mul", self._do("Sign", x), left)
        if op == "Gelu":
            return self._gelu(x)
        if op == "LayerNormalization":
            return self._norm(x, *inputs[1:])
        attributes = {key: attribute.value for key, attribute in self.node.attributes.items()}
        return self._do(op, *inputs, word="double", **attributes)

    def _norm(self, x: ir.Value, weight: ir.Value | None = None, bias: ir.Value | None = None) -> ir.Value:
        axes = constant(
            self.graph, f"{self.node.outputs[0].name}.axes", np.array(_normed(self.node), np.int64)
        )
        centred = self._do("Sub", x, self._do("ReduceMean", x, axes))
        variance = self._do("ReduceMean", self._do("Mul", centred, centred), axes)
        epsilon = self._number(self.node.attributes.get_float("epsilon", 1e-5))
        # With Pow or Div, ONNX Runtime finds a layer norm, and one of fp32 behind the Cast.
        inverse = self._do("Reciprocal", self._do("Sqrt", self._do("Add", variance, epsilon)))
        result = self._do("Mul", centred, inverse)
        if weight is not None:
            result = self._do("Mul", result, weight)
        return result if bias is None else self._do("Add", result, bias)

    def _gelu(self, x: ir.Value) -> ir.Value:
        if self.node.attributes.get_string("approximate", "none") == "tanh":
            cube = self._do("Mul", self._do("Mul", x, x), x)
            inner = self._do("Add", x, self._do("Mul", self._number(TANH_CUBE), cube))
            tanh = self._do("Tanh", self._do("Mul", self._number(TANH_SCALE), inner))
            half = self._do("Mul", self._number(0.5), x)
            return self._do("Mul", half, self._do("Add", self._number(1.0), tanh))
        size = self._do("Abs", x)
        tail = self._erfc(self._do("Mul", size, self._number(ROOT_HALF)))
        return self._do(
            "Sub", self._do("Relu", x), self._do("Mul", self._do("Mul", size, self._number(0.5)), tail)
        )

    def _erfc(self, z: ir.Value) -> ir.Value:
        one, half = self._number(1.0), self._number(0.5)
        t = self._do("Div", one, self._do("Add", self._do("Mul", z, half), one))
        power = self._number(COEFFICIENTS[-1])
        for coefficient in COEFFICIENTS[-2::-1]:
            power = self._do("Add", self._do("Mul", power, t), self._number(coefficient))
        return self._do("Mul", t, self._do("Exp", self._do("Sub", power, self._do("Mul", z, z))))

    def _number(self, value: float) -> ir.Value:
        return constant(self.graph, f"double.{value!r}", np.array(value, np.float64))

    def _do(self, op: str, *inputs: ir.Value | None, word: str = "", **attributes: object) -> ir.Value:
        name = f"{self.node.outputs[0].name}.{word or f'step{len(self.made)}'}"
        return append(self.made, op, inputs, name, attributes)

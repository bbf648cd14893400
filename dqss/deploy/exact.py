"""Layers and averages of a graph in exact sums, as :mod:`dqss.arithmetic.codes` computes them.

``QuantizeLinear(s)``, ``DequantizeLinear(1)``: the code less its zero point, in fp32; the convolution or
product of that with whole numbers; ``Mul`` by ``s_a s_w``; ``Add`` of the bias. Runtimes must not find
anything to improve there. ONNX Runtime multiplies a ``Mul`` into the weights of the convolution before it
where the constant stands on its right, so it stands on the left; weights are integers behind a ``Cast``,
which is folded when the file is loaded, and nothing takes them for a quantized layer's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from dqss.arithmetic.codes import CodeSum, code_sum
from dqss.arithmetic.halving import next_power
from dqss.deploy.containers import WEIGHT_WIDTHS, Container, Held, container_of
from dqss.deploy.graphs import append, constant, transposes_of
from dqss.deploy.grids import Array, Grids, dtype_of
from dqss.mixing import Grid

SUMS = ("Conv", "Gemm", "MatMul")


class ExactLayers:
    """Rewrites layers whose inputs and weights are on grids, in place.

    Args:
        graph: whose activations have been lowered, and whose weights have not.
        grids: of the quantizers.
        restored: what comes out of a ``DequantizeLinear`` of an activation, and its quantizer.

    Attributes:
        sums: the nodes that sum codes, as they are written.
    """

    def __init__(self, graph: ir.Graph, grids: Grids, restored: Mapping[ir.Value, str]) -> None:
        self.graph, self.grids, self.restored = graph, grids, restored
        self.codes: dict[ir.Value, ir.Value] = {}
        self.sums: set[ir.Node] = set()

    def rewrite(self, weight: ir.Node, held: dict[str, Held]) -> bool:
        """Every layer that reads a named weight.

        Args:
            weight: its node, which goes if nothing else reads it.
            held: is told how its integers are held then.

        Returns:
            Whether it is gone.
        """
        name, source = weight.attributes.get_string("name"), weight.inputs[0]
        if source is None or source.const_value is None:
            return False
        values, kind = torch.from_numpy(np.array(source.const_value.numpy())), None
        for node, turned in list(_readers(weight.outputs[0])):
            found = self._inputs(node)
            total = None if found is None else code_sum(values, self._grid(name), self._grid(found[1]))
            if found is not None and total is not None:
                self._replace(node, found[0], name, total, turned)
                kind = container_of(total.spec, WEIGHT_WIDTHS)
        for node in list(transposes_of(weight.outputs[0])):
            if not node.outputs[0].uses():
                self.graph.remove(node, safe=True)
        if kind is None or weight.outputs[0].uses() or weight.outputs[0].is_graph_output():
            return False
        self.graph.remove(weight, safe=True)
        held[name] = Held(kind)
        return True

    def _grid(self, name: str) -> Grid:
        return Grid(self.grids.scale(name), self.grids.zero_point(name), self.grids.spec(name))

    def _inputs(self, node: ir.Node) -> tuple[ir.Value, str] | None:
        """What a layer reads, as codes, and the quantizer of that; None where it cannot be rewritten."""
        x, bias = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        if x is None or (bias is not None and bias.const_value is None):
            return None
        plain = all(node.attributes.get_float(key, 1.0) == 1.0 for key in ("alpha", "beta"))
        return self._as_codes(x) if plain and not node.attributes.get_int("transA", 0) else None

    def _as_codes(self, x: ir.Value) -> tuple[ir.Value, str] | None:
        node = x.producer()
        if x in self.restored and node is not None:
            if x not in self.codes:
                one = constant(self.graph, "one", np.array(1, np.float32))
                inputs = [node.inputs[0], one, *node.inputs[2:]]
                self.codes[x] = self._copied(node, inputs, f"{x.name}.whole")
            return self.codes[x], self.restored[x]
        if node is not None and node.op_type == "Pad" and _pads_zeros(node):
            found = None if node.inputs[0] is None else self._as_codes(node.inputs[0])
            if found is not None and x not in self.codes:
                self.codes[x] = self._copied(node, [found[0], *node.inputs[1:]], f"{x.name}.whole")
            return None if found is None else (self.codes[x], found[1])
        return None

    def _copied(self, node: ir.Node, inputs: list[ir.Value | None], name: str) -> ir.Value:
        """The same node with other inputs, behind it."""
        made: list[ir.Node] = []
        value = append(made, node.op_type, inputs, name, dict(node.attributes))
        value.shape, value.type = node.outputs[0].shape, node.outputs[0].type
        made[0].metadata_props.update(node.metadata_props)
        self.graph.insert_after(node, made[0])
        return value

    def _replace(self, node: ir.Node, x: ir.Value, name: str, total: CodeSum, turned: bool) -> None:
        old, made = node.outputs[0], list[ir.Node]()
        axes = len(total.digits.parts[0].shape) - 2 if node.op_type == "Conv" else 0
        found: ir.Value | None = None
        for number in range(len(total.digits.parts)):
            weight = self._weight(total, number, name, f"{old.name}.weight{number}", turned, made)
            each = append(made, node.op_type, [x, weight], f"{old.name}.sum{number}", dict(node.attributes))
            self.sums.add(made[-1])
            if found is not None:
                base = constant(self.graph, f"digit.{total.digits.base}", _float(total.digits.base))
                higher = append(made, "Mul", [base, found], f"{old.name}.higher{number}")
                each = append(made, "Add", [higher, each], f"{old.name}.digits{number}")
            found = each
        unit = constant(self.graph, f"{old.name}.unit", _wide(total.unit.numpy(), axes))
        result = append(made, "Mul", [unit, found], f"{old.name}.scaled")
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and bias.const_value is not None:
            values = constant(self.graph, f"{old.name}.bias", _wide(bias.const_value.numpy(), axes))
            result = append(made, "Add", [values, result], f"{old.name}.biased")
        put(self.graph, node, made, result)

    def _weight(
        self, total: CodeSum, number: int, name: str, output: str, turned: bool, made: list[ir.Node]
    ) -> ir.Value:
        """One digit of a layer's weight as whole numbers in fp32."""
        part, zero, kind = total.digits.parts[number], torch.zeros(()), None
        if len(total.digits.parts) == 1:
            # Moved by their zero points, codes take no more room than their grid says.
            zero, kind = total.zero, container_of(total.spec, WEIGHT_WIDTHS)
        codes = part + zero
        if turned:
            codes, zero = codes.T, zero.reshape(1, -1)
        # By way of int32: there is no cast from float to four bits that is sure to round nothing.
        stored = codes.numpy().astype(np.int32).astype(dtype_of(kind or _narrowest(part)))
        tag = f"{name}.whole{number or ''}{'.transposed' if turned else ''}"
        found = append(made, "Cast", [constant(self.graph, tag, stored)], output, _TO_FLOAT)
        if zero.any():
            moved = constant(self.graph, f"{name}.zero{'.transposed' if turned else ''}", zero.numpy())
            found = append(made, "Sub", [found, moved], f"{output}.moved")
        return found


_TO_FLOAT = {"to": int(ir.DataType.FLOAT)}


def halve_means(graph: ir.Graph) -> int:
    """Averages over whole images of a fixed size as :func:`dqss.arithmetic.halving.halved_mean`, in place.

    Returns:
        How many there were.
    """
    found = [node for node in graph if _global_size(node)]
    for node in found:
        _halve(graph, node)
    return len(found)


def _halve(graph: ir.Graph, node: ir.Node) -> None:
    x, old, count, made = node.inputs[0], node.outputs[0], _global_size(node), list[ir.Node]()
    assert x is not None and x.shape is not None

    def shape(name: str, *values: int) -> ir.Value:
        return constant(graph, f"{old.name}.{name}", np.array(values, np.int64))

    total = append(made, "Reshape", [x, shape("row_shape", 0, 0, -1)], f"{old.name}.row")
    size = next_power(count)
    if size > count:
        ends = shape("row_ends", 0, 0, 0, 0, 0, size - count)
        total = append(made, "Pad", [total, ends], f"{old.name}.row_filled")
    while size > 1:
        size //= 2
        halves = [ir.Value(name=f"{old.name}.{word}{size}") for word in ("first", "second")]
        options = {"axis": 2, "num_outputs": 2}
        made.append(ir.node("Split", [total], options, outputs=halves, name=f"{halves[0].name}.Split"))
        total = append(made, "Add", halves, f"{old.name}.halved{size}")
    mean = append(made, "Div", [total, constant(graph, f"count.{count}", _float(count))], f"{old.name}.mean")
    keeps = node.op_type == "GlobalAveragePool" or node.attributes.get_int("keepdims", 1) != 0
    axes = shape("mean_shape", 0, 0, *[1] * (len(x.shape) - 2)) if keeps else shape("mean_shape", 0, -1)
    result = append(made, "Reshape", [mean, axes], f"{old.name}.final")
    put(graph, node, made, result)


def _global_size(node: ir.Node) -> int:
    """How many values a node averages over, if these are all behind the channels; 0 where it does not."""
    if node.op_type not in ("ReduceMean", "GlobalAveragePool") or node.inputs[0] is None:
        return 0
    shape = node.inputs[0].shape
    sizes = [size for size in (shape or ())[2:] if isinstance(size, int)]
    if shape is None or len(shape) < 3 or len(sizes) < len(shape) - 2:
        return 0
    if node.op_type == "ReduceMean":
        given = node.inputs[1] if len(node.inputs) > 1 else None
        if given is None or given.const_value is None:
            return 0
        axes = {int(axis) % len(shape) for axis in given.const_value.numpy().reshape(-1)}
        if axes != set(range(2, len(shape))):
            return 0
    return math.prod(sizes)


def put(graph: ir.Graph, node: ir.Node, made: list[ir.Node], result: ir.Value) -> None:
    """``made`` in the place of ``node``, its last value in the place of the node's."""
    old = node.outputs[0]
    result.shape, result.type = old.shape, old.type
    for fresh in made:
        fresh.metadata_props.update(node.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, [old], [result])


def _readers(weight: ir.Value) -> Iterator[tuple[ir.Node, bool]]:
    """Layers that read a weight, and whether with its axes exchanged."""
    both = ((weight, False), *((node.outputs[0], True) for node in transposes_of(weight)))
    for value, turned in both:
        for node in value.consumers():
            if node.op_type in SUMS and len(node.inputs) > 1 and node.inputs[1] is value:
                # Of a matrix product, rows of the weight are channels.
                rows = turned != bool(node.attributes.get_int("transB", 0))
                if node.op_type == "Conv" or rows:
                    yield node, turned


def _pads_zeros(node: ir.Node) -> bool:
    """Or what it finds there."""
    mode, value = node.attributes.get_string("mode", "constant"), node.inputs[2:3]
    if mode != "constant" or not value or value[0] is None:
        return True
    return value[0].const_value is not None and not value[0].const_value.numpy().any()


def _narrowest(values: Tensor) -> Container:
    """The narrowest integer type that holds them all."""
    low, high = (int(x) for x in torch.aminmax(values))
    kinds: Iterable[Container] = (Container(bits, low < 0) for bits in WEIGHT_WIDTHS)
    return next(kind for kind in kinds if kind.low <= low and high <= kind.high)


def _wide(values: Array, axes: int) -> Array:
    return values.reshape(-1, *[1] * axes)


def _float(value: float) -> Array:
    return np.array(value, np.float32)

"""In the place of named nodes, what ONNX has for quantizers.

An activation becomes ``Clip``, ``QuantizeLinear``, ``DequantizeLinear``. ``QuantizeLinear`` saturates
at the ends of its integer type; where the grid is narrower, real values are clipped to it before.
That is exact: with s the scale and k an end of ``code - zero_point``, ``x / s`` is monotonic in x,
and ``(k s) / s`` rounds to k for every k of up to 17 bits, whatever s is. A weight becomes integers
behind a ``DequantizeLinear``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from dqss.arithmetic.weights import coarsen, least_scale, whole
from dqss.deploy.containers import Held, hold_activation, hold_weight, unsaturated
from dqss.deploy.doubles import widen
from dqss.deploy.exact import ExactLayers, halve_means
from dqss.deploy.graphs import append, constant, transposes_of
from dqss.deploy.grids import Array, Grids, Stored, dtype_of, store
from dqss.deploy.marks import DOMAIN, QUANTIZE, WEIGHT, Call
from dqss.deploy.targets import Target
from dqss.errors import ExportError
from dqss.spec import PerGroup, PerTensor, QuantSpec


@dataclass
class Lowered:
    """What became of the named nodes.

    Attributes:
        codes: the integers of each quantized activation, by quantizer and call.
        held: how each quantizer's codes are held, by its name.
        clipped: quantizers of activations whose grid needs a ``Clip``.
    """

    codes: dict[Call, ir.Value] = field(default_factory=dict)
    held: dict[str, Held] = field(default_factory=dict)
    clipped: list[str] = field(default_factory=list)


def lower(
    model: ir.Model, grids: Grids, target: Target, in_float: Collection[str] = (), exact: bool = False
) -> Lowered:
    """Replace every named node of a traced graph, in place.

    Args:
        model: from :func:`dqss.deploy.trace.trace`.
        grids: of the quantizers that the nodes name.
        target: what the file is for.
        in_float: layers that no runtime should compute in integers.
        exact: compute layers and averages in exact sums (:mod:`dqss.deploy.exact`), where they have them.
    """
    work = _Lowering(model.graph, grids, target, in_float)
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    for node in (node for node in nodes if node.op_type == QUANTIZE):
        work.activation(node)
    # Afterwards, because how a weight is stored depends on what it is multiplied with.
    weights = [node for node in nodes if node.op_type == WEIGHT]
    sums: set[ir.Node] = set()
    if exact:
        layers = ExactLayers(model.graph, grids, work.restored)
        weights = [node for node in weights if not layers.rewrite(node, work.done.held)]
        sums = layers.sums
        halve_means(model.graph)
    for node in weights:
        work.weight(node)
    if exact:
        widen(model.graph, sums)
    del model.opset_imports[DOMAIN]
    return work.done


class _Lowering:
    def __init__(self, graph: ir.Graph, grids: Grids, target: Target, in_float: Collection[str]) -> None:
        self.graph, self.grids, self.target, self.in_float = graph, grids, target, in_float
        self.done = Lowered()
        self.restored: dict[ir.Value, str] = {}  # names of the quantizers
        self.known: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}

    # -- activations --------------------------------------------------------------------------

    def activation(self, node: ir.Node) -> None:
        name, call = node.attributes.get_string("name"), node.attributes.get_int("call")
        spec = self.grids.spec(name)
        held = self.done.held[name] = hold_activation(spec, self.target.signed_activations)
        x, tag = node.inputs[0], f"{name}.{call}" if call else name
        assert x is not None
        grid = spec, self.grids.scale(name).numpy().tobytes(), self.grids.zero_point(name).numpy().tobytes()
        if (x, grid) in self.known:
            # One tensor on one grid is one pair of nodes, whoever reads it.
            quantized, restored = self.known[x, grid]
            self.done.codes[name, call] = quantized
            self._put(node, [], restored)
            return
        axis = _axis_of(spec, x)
        made: list[ir.Node] = []
        scale, zero = (
            self._shaped(self.grids.scale(name), spec),
            self._shaped(self.grids.zero_point(name), spec),
        )
        clipped = self._clipped(x, name, tag, spec, held, made)
        parameters = [
            self.constant(f"{name}.scale", scale),
            self.constant(f"{name}.zero_point", (zero + held.offset).astype(dtype_of(held.container))),
        ]
        attributes = {} if axis is None else {"axis": axis}
        quantized = append(made, "QuantizeLinear", [clipped, *parameters], f"{tag}.codes", attributes)
        quantized.type, quantized.shape = ir.TensorType(ir.DataType[held.container.name.upper()]), x.shape
        restored = append(made, "DequantizeLinear", [quantized, *parameters], f"{tag}.quantized", attributes)
        self.done.codes[name, call] = quantized
        self.restored[restored] = name
        # Quantized again it is what it is.
        self.known[x, grid] = self.known[restored, grid] = quantized, restored
        self._put(node, made, restored)

    def _clipped(
        self, x: ir.Value, name: str, tag: str, spec: QuantSpec, held: Held, made: list[ir.Node]
    ) -> ir.Value:
        ends = unsaturated(spec, held)
        if ends == (None, None):
            return x
        if name not in self.done.clipped:
            self.done.clipped.append(name)
        scale, zero_point = self.grids.scale(name), self.grids.zero_point(name)
        bounds = [None if end is None else ((end - zero_point) * scale).numpy() for end in ends]
        if isinstance(spec.granularity, PerTensor):
            limits = [
                None if bound is None else self.constant(f"{name}.{word}", bound.reshape(()))
                for word, bound in zip(("low", "high"), bounds, strict=True)
            ]
            return append(made, "Clip", [x, *limits], f"{tag}.clipped")
        # Clip takes scalars only.
        for op, word, bound in zip(("Max", "Min"), ("low", "high"), bounds, strict=True):
            if bound is not None:
                wide = bound.reshape(-1, *[1] * (-spec.granularity.axis - 1))
                x = append(made, op, [x, self.constant(f"{name}.{word}", wide)], f"{tag}.{word}_clipped")
        return x

    def _shaped(self, values: torch.Tensor, spec: QuantSpec) -> Array:
        found: Array = values.numpy()
        return found.reshape(()) if isinstance(spec.granularity, PerTensor) else found

    # -- weights ------------------------------------------------------------------------------

    def weight(self, node: ir.Node) -> None:
        name = node.attributes.get_string("name")
        layer = name.removesuffix(".weight")
        scale, zero_point, spec = whole(
            self.grids.scale(name), self.grids.zero_point(name), self.grids.spec(name)
        )
        held = self.done.held[name] = hold_weight(spec, self.target.weight_widths)
        source = node.inputs[0]
        if source is None or source.const_value is None:
            raise ExportError(f"layer {layer!r}: its weight is computed in the forward pass")
        values = torch.from_numpy(np.array(source.const_value.numpy()))
        apart = layer in self.in_float or self._is_apart(node.outputs[0], spec, held)
        if not apart:
            least = self._least_scale(node.outputs[0], held)
            if bool((scale < least).any()) and spec.symmetric and scale.numel() > 1:
                values, scale = coarsen(values, scale, least, spec)
            apart = bool((scale < least).any())
        try:
            stored = store(values, scale, zero_point, spec, held, apart)
        except ValueError as error:
            raise ExportError(f"layer {layer!r}: {error}") from error
        # Runtimes look for a matrix product behind a DequantizeLinear: no Transpose may stand between.
        for user in transposes_of(node.outputs[0]) if stored.rows is None else ():
            self._store(user, f"{name}.transposed", stored.transposed())
        if node.outputs[0].uses() or node.outputs[0].is_graph_output():
            self._store(node, name, stored)
        else:
            self.graph.remove(node, safe=True)

    def _is_apart(self, weight: ir.Value, spec: QuantSpec, held: Held) -> bool:
        """Whether something must stand between ``DequantizeLinear`` and what multiplies.

        Where both operands come straight out of integers, ONNX Runtime rounds the bias to whole units
        of the product of their scales, also if nothing is computed in integers then. At less than
        eight bits that is a large part of the next activation's step. And where a matrix product reads
        a weight in blocks, or an input that is not quantized, it rounds that input to eight bits of
        its own. A Reshape keeps it from both.
        """
        for name, bias in self._biased(weight):
            if held.container.bits != 8 or self.grids.spec(name).bits < 8 or bias.const_value is None:
                return True
        for read in (weight, *(node.outputs[0] for node in transposes_of(weight))):
            for node in read.consumers():
                others = [x for x in node.inputs[:2] if x is not read]
                if node.op_type in ("Gemm", "MatMul") and (
                    isinstance(spec.granularity, PerGroup) or any(x not in self.restored for x in others)
                ):
                    return True
        return False

    def _least_scale(self, weight: ir.Value, held: Held) -> torch.Tensor:
        """``[C]``, or one value: below it a bias would be more units than an accumulator counts to."""
        least = torch.zeros(1)
        for name, bias in self._biased(weight):
            inputs = self.grids.scale(name)
            if inputs.numel() == 1 and bias.const_value is not None:
                values = torch.from_numpy(np.array(bias.const_value.numpy()))
                least = torch.maximum(least, least_scale(values, inputs, held.shift))
        return least

    def _biased(self, weight: ir.Value) -> Iterator[tuple[str, ir.Value]]:
        """Where a weight is multiplied with quantized inputs: the quantizer's name, and the bias."""
        for node in weight.consumers():
            if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.inputs) > 2:
                x, bias = node.inputs[0], node.inputs[2]
                name = None if x is None else self.restored.get(x)
                if name is not None and bias is not None:
                    yield name, bias

    def _store(self, node: ir.Node, name: str, stored: Stored) -> None:
        made: list[ir.Node] = []
        inputs = [self.constant(f"{name}.codes", stored.codes), self.constant(f"{name}.scale", stored.scale)]
        if stored.zero_point is not None:
            inputs.append(self.constant(f"{name}.zero_point", stored.zero_point))
        attributes: dict[str, Any] = {}
        if stored.scale.ndim:
            attributes = {"axis": stored.axis} | ({"block_size": stored.block} if stored.block else {})
        value = append(made, "DequantizeLinear", inputs, f"{name}.quantized", attributes)
        if stored.rows is not None:
            shape = self.constant(f"{name}.shape", np.array(stored.rows, np.int64))
            value = append(made, "Reshape", [value, shape], f"{name}.shaped")
            if stored.channel_axis:
                order = [*range(1, len(stored.rows))]
                order.insert(stored.channel_axis, 0)
                value = append(made, "Transpose", [value], f"{name}.ordered", {"perm": order})
        self._put(node, made, value)

    # -- the graph ----------------------------------------------------------------------------

    def constant(self, name: str, values: Array) -> ir.Value:
        """An initializer; the same one for a name that is there already."""
        return constant(self.graph, name, values)

    def _put(self, node: ir.Node, made: list[ir.Node], result: ir.Value) -> None:
        """``made`` in the place of ``node``, its last value in the place of the node's."""
        old = node.outputs[0]
        result.shape, result.type = old.shape, old.type
        for fresh in made:
            fresh.metadata_props.update(node.metadata_props)
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], made, [old], [result])


def _axis_of(spec: QuantSpec, x: ir.Value) -> int | None:
    if isinstance(spec.granularity, PerTensor):
        return None
    # Counted from the end in a strategy; runtimes are surer of axes that are not negative.
    return spec.granularity.axis if x.shape is None else spec.granularity.axis % len(x.shape)

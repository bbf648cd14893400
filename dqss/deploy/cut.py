"""A graph cut at every quantized activation, so that each part can be fed what the simulation has there.

The integers that a ``QuantizeLinear`` gives become an output, and what reads them reads an input.
One run then compares every part of the network in integer steps, and no difference reaches the next
part. Cut there and nowhere else, a runtime fuses what it fuses in the whole network.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from dqss.deploy.compared import Part
from dqss.deploy.marks import Call
from dqss.deploy.tidy import MODULE

_MULTIPLIES = ("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul")


def given(output: str) -> str:
    """Name of the input that stands for a cut output."""
    return f"{output}.given"


def cut(model: ir.Model, codes: Mapping[Call, str]) -> tuple[ir.Model, list[Part]]:
    """Cut a copy of a model.

    Args:
        model: a lowered one.
        codes: names of the integers of each quantized activation.

    Returns:
        The cut model, and its parts in the order of the graph, those of the network's outputs last.
    """
    model = ir.from_proto(ir.to_proto(model))
    graph = model.graph
    own_outputs = list(graph.outputs)
    calls = {name: call for call, name in codes.items()}
    values = [value for node in graph for value in node.outputs if value.name in calls]
    for value in values:
        assert value.name is not None
        entry = ir.Value(name=given(value.name), shape=value.shape, type=value.type)
        ir.convenience.replace_all_uses_with(value, entry)
        graph.inputs.append(entry)
    graph.outputs[:] = [*values, *own_outputs]
    order = {node: position for position, node in enumerate(graph)}
    parts = [Part(str(value.name), _modules(value, order), calls[str(value.name)]) for value in values]
    return model, parts + [Part(str(value.name), _modules(value, order)) for value in own_outputs]


def _modules(value: ir.Value, order: Mapping[ir.Node, int]) -> tuple[str, ...]:
    """Upstream of ``value`` up to the cuts, in the order of the graph."""
    waiting, seen = [value.producer()], set[ir.Node]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [source.producer() for source in node.inputs if source is not None]
    found = sorted((node for node in seen if node.op_type in _MULTIPLIES), key=lambda node: order[node])
    return tuple(dict.fromkeys(node.metadata_props.get(MODULE, str(node.name)) for node in found))

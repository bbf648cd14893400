"""A graph fit to be given away: nothing twice, nothing unused, no traces of the machine it was made on."""

from __future__ import annotations

import ast
import json
import re

import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as passes

from dqss import __version__
from dqss.bundle import Bundle

MODULE = "dqss.module"
"""Key of a node's metadata: the module in whose forward it stands."""
STRATEGY = "dqss.strategy"
"""Key of the file's metadata: the strategy as compact JSON, without the options that loaded the model."""
_SCOPES = "pkg.torch.onnx.name_scopes"


def tidy(model: ir.Model, bundle: Bundle, **facts: str) -> None:
    """Clean a lowered model in place and write down what it is.

    Torch leaves stack traces, with paths, in the metadata of every node; only the name of its module
    stays.

    Args:
        model: without named nodes.
        bundle: whose strategy goes into the file.
        facts: further metadata, under ``dqss.NAME``.
    """
    modules = {node: _module_of(node) for node in model.graph}
    Sequential(passes.ClearMetadataAndDocStringPass(), passes.RemoveUnusedNodesPass())(model)
    passes.DeduplicateInitializersPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    graph = model.graph
    for named in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        named.metadata_props.clear()
    _name_axes(graph)
    for node in graph:
        name = modules.get(node)
        if name:
            node.metadata_props[MODULE] = name
    model.producer_name, model.producer_version = "dqss", __version__
    graph.name = bundle.strategy.model.name or "network"
    strategy = bundle.strategy.as_dict()
    # Paths of checkpoints are in it, and are nobody's business where the file goes.
    strategy["model"]["input"].pop("config", None)
    model.metadata_props[STRATEGY] = json.dumps(strategy, separators=(",", ":"))
    for key, value in facts.items():
        model.metadata_props[f"dqss.{key}"] = value


_AXES = {0: "batch", 2: "height", 3: "width"}


def _name_axes(graph: ir.Graph) -> None:
    """Words in the place of ``s27`` for the open axes of inputs, and where outputs depend on them."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            word = _AXES.get(axis) if axis == 0 or len(value.shape or ()) == 4 else None
            if not isinstance(size, int) and word is not None and word not in names.values():
                names.setdefault(str(size.value), word)
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            sizes = [size if isinstance(size, int) else str(size.value) for size in value.shape]
            value.shape = ir.Shape(
                [_renamed(size, names) if isinstance(size, str) else size for size in sizes]
            )


def _renamed(size: str, names: dict[str, str]) -> str:
    return re.sub(r"\w+", lambda found: names.get(found[0], found[0]), size)


def _module_of(node: ir.Node) -> str:
    """The innermost module's name in the user's network."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (SyntaxError, ValueError):
        return ""
    names = [str(scope) for scope in scopes[:-1] if str(scope).startswith("network.network")]
    inner = names[-1].removeprefix("network.network").lstrip(".") if names else ""
    for ours in (".input_quantizer", ".output_quantizer", ".parametrizations.weight"):
        inner = inner.partition(ours)[0]
    return inner.partition("product_quantizers")[0].rstrip(".")

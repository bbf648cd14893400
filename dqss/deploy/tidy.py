"""A graph fit to be given away: nothing twice, nothing unused, no traces of the machine it was made on."""

from __future__ import annotations

import ast
import json

import onnx_ir as ir
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as passes

from dqss import __version__
from dqss.bundle import Bundle

MODULE = "dqss.module"
"""Key of a node's metadata: the module in whose forward it stands."""
STRATEGY = "dqss.strategy"
"""Key of the file's metadata: the strategy as compact JSON."""
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
    for node in model.graph:
        name = modules.get(node)
        if name:
            node.metadata_props[MODULE] = name
    model.producer_name, model.producer_version = "dqss", __version__
    model.graph.name = bundle.strategy.model.name or "network"
    model.metadata_props[STRATEGY] = json.dumps(bundle.strategy.model_dump(), separators=(",", ":"))
    for key, value in facts.items():
        model.metadata_props[f"dqss.{key}"] = value


def _module_of(node: ir.Node) -> str:
    """The innermost module's name in the user's network."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (SyntaxError, ValueError):
        return ""
    names = [str(scope) for scope in scopes[:-1] if str(scope).startswith("network.network")]
    inner = names[-1].removeprefix("network.network").lstrip(".") if names else ""
    for ours in (".input_quantizer", ".parametrizations.weight"):
        inner = inner.partition(ours)[0]
    return inner.partition("product_quantizers")[0].rstrip(".")

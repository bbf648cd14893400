"""From a marked network to a graph: ``torch.export``, then torch's translation to ONNX.

The network is traced through a function of tensors alone, because only tensors become inputs and
outputs of a graph: what else a batch holds is a constant of the graph, and what else an output
holds is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dqss.calls import call_model, tensors_in
from dqss.deploy.function import OfTensors, axes, first_words, quietly, tensors_of
from dqss.deploy.marks import Marked
from dqss.errors import ExportError

OPSET = 21
"""The first with integers of four bits and with scales for blocks."""


@dataclass(frozen=True)
class Signature:
    """How a batch becomes the inputs of a graph.

    Attributes:
        inputs: names of its tensors, in their order.
        outputs: names of the network's output tensors.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def trace(marked: Marked, batch: Any, dynamic_size: bool) -> tuple[ir.Model, Signature]:
    """The marked network as a graph.

    Args:
        marked: on the CPU, fp32.
        batch: what it is traced with, of two samples or more, so that the batch stays an axis.
        dynamic_size: leave the last two axes of images open as well, beside the first.

    Raises:
        ExportError: where torch cannot trace or translate it.
    """
    tensors = tensors_of(batch)
    signature = Signature(_input_names(batch), _output_names(marked, batch))
    function = OfTensors(marked, batch)
    try:
        with quietly(), torch.no_grad(), marked.notes.while_tracing():
            program = torch.export.export(
                function,
                tuple(tensors),
                dynamic_shapes=(tuple(axes(tensor, dynamic_size) for tensor in tensors),),
                strict=False,
            )
            translated = torch.onnx.export(
                program,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                input_names=list(signature.inputs),
                output_names=list(signature.outputs),
            )
    except Exception as error:
        raise ExportError(
            f"torch cannot trace this network for ONNX ({first_words(error)}); "
            "the simulation runs without a trace: apply_strategy"
        ) from error
    assert translated is not None
    for value in translated.model.graph.inputs:
        _settle(value)
    return translated.model, signature


def _settle(value: ir.Value) -> None:
    """A size that turned out to be fixed may still look like a symbol, of the name ``2``."""
    if value.shape is not None:
        sizes = [size if isinstance(size, int) else str(size.value) for size in value.shape]
        value.shape = ir.Shape([int(size) if str(size).isdigit() else size for size in sizes])


def _input_names(batch: Any) -> tuple[str, ...]:
    if isinstance(batch, Tensor):
        return ("input",)
    paths, _ = pytree.tree_flatten_with_path(batch)
    tensors = [path for path, leaf in paths if isinstance(leaf, Tensor)]
    names = [re.sub(r"\W+", "_", pytree.keystr(path)).strip("_") for path in tensors]
    return tuple(f"input_{name}" if name[:1].isdigit() else name for name in names)


@torch.no_grad()
def _output_names(marked: Marked, batch: Any) -> tuple[str, ...]:
    output = call_model(marked, batch)
    count = sum(1 for _ in tensors_in(output))
    if isinstance(output, Mapping) and count == len(output):
        return tuple(re.sub(r"\W+", "_", str(key)) for key in output)
    return ("output",) if count == 1 else tuple(f"output_{index}" for index in range(count))

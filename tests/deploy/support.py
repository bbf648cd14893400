"""The shortest ways to a bundle, and to a file of one node."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, nn

from dqss.bundle import Bundle
from dqss.deploy.lower import lower
from dqss.deploy.marks import DOMAIN
from dqss.deploy.targets import GENERIC, Target
from dqss.space import SearchSpace
from dqss.spec import QuantSpec
from tests.support.nets import bundle_of, every_other, prepared_supernet


def bundle_for(model: nn.Module, batch: Any, space: SearchSpace, start: int = 0) -> Bundle:
    """A strategy that takes the options of a space in rotation."""
    prepared, supernet = prepared_supernet(model, batch, space)
    return bundle_of(prepared, supernet, every_other(supernet, start), batch)


@dataclass
class OneGrid:
    """The grids of a bundle with a single quantizer, ``layer.activation`` or ``layer.weight``."""

    of: QuantSpec
    scales: Tensor
    zero_points: Tensor

    def spec(self, name: str) -> QuantSpec:
        return self.of

    def scale(self, name: str) -> Tensor:
        return self.scales

    def zero_point(self, name: str) -> Tensor:
        return self.zero_points


def lowered(
    kind: str,
    name: str,
    grid: OneGrid,
    shape: Sequence[int],
    values: Tensor | None = None,
    target: Target = GENERIC,
) -> bytes:
    """A file that quantizes its input, or (with ``values``) that has a quantized weight for output."""
    x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    if values is not None:
        x.const_value = ir.tensor(values.numpy(), name="x")
    y = ir.Value(name="y", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    attributes = {"name": name} | ({"call": 0} if values is None else {})
    node = ir.node(kind, [x], attributes, domain=DOMAIN, outputs=[y])
    out = ir.Value(name="out", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    last = ir.node("Identity", [y], outputs=[out])
    graph = ir.Graph(
        [x] if values is None else [],
        [out],
        nodes=[node, last],
        initializers=[] if values is None else [x],
        opset_imports={"": 21, DOMAIN: 1},
        name="one",
    )
    model = ir.Model(graph, ir_version=10)
    lower(model, grid, target)  # type: ignore[arg-type]
    if values is not None:
        graph.initializers.pop("x")
    return ir.to_proto(model).SerializeToString()


def run(data: bytes, feeds: Mapping[str, Tensor]) -> np.ndarray:
    """The only output of a file in ONNX Runtime, as it is written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in feeds.items()})[0]


def random_grid(spec: QuantSpec, count: int, seed: int) -> OneGrid:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(torch.randn(count, generator=generator) * 3)
    zero = torch.zeros(count)
    if not spec.symmetric:
        zero = torch.randint(spec.qmin, spec.qmax + 1, (count,), generator=generator).float()
    return OneGrid(spec, scale, zero)

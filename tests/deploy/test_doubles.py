"""Files of transformers in exact sums: the simulation's bits also of what has no exact result."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import dqss
from dqss.apply import apply_strategy
from dqss.arithmetic import EXACT
from dqss.arithmetic.doubles import Doubles
from dqss.deploy.doubles import widen
from dqss.deploy.report import ExportReport
from dqss.deploy.trace import OPSET
from search_spaces import uniform
from tests.deploy.support import bundle_for
from tests.deploy.test_exact import LEVELS, optimized
from tests.support.nets import images

SIZE, HEADS = 16, 2


class Attention(nn.Module):
    """Written out, or as one function."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.scale = fused, (SIZE // HEADS) ** -0.5
        self.qkv, self.proj = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, HEADS, SIZE // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            found = F.scaled_dot_product_attention(q, k, v)
        else:
            found = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(found.transpose(1, 2).reshape(n, t, SIZE))


class Block(nn.Module):
    def __init__(self, fused: bool, activation: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(SIZE), nn.LayerNorm(SIZE, eps=1e-6)
        self.attention, self.activation = Attention(fused), activation
        self.fc1, self.inner, self.fc2 = nn.Linear(SIZE, 32), nn.LayerNorm(32), nn.Linear(32, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        # Nothing is quantized between an activation and the norm behind it.
        return x + self.fc2(self.inner(self.activation(self.fc1(self.norm2(x)))))


class ByErf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class Transformer(nn.Module):
    """A block for each activation, attention written out in the first; then a gate."""

    def __init__(self, *activations: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, SIZE, 2, stride=2)
        self.blocks = nn.Sequential(*(Block(bool(n % 2), kind) for n, kind in enumerate(activations)))
        self.gate, self.head = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embed(x).flatten(2).transpose(1, 2))
        x = F.layer_norm(x * torch.tanh(self.gate(x)), (SIZE,))
        return F.log_softmax(self.head(x[:, 0]), -1)


def exported(
    path: Path, model: Transformer, bits: int, products: bool
) -> tuple[ExportReport, Tensor, Tensor]:
    """What was written, inputs, and what the simulation makes of them."""
    inputs = 2 * images(9)
    bundle = bundle_for(model, inputs, uniform(bits, bits, ["mse"], ["mse"], products=products))
    assert bool(bundle.strategy.products) == products
    report = dqss.export_model(model, bundle, path / "model.onnx", inputs)
    with torch.no_grad():
        return report, inputs, apply_strategy(model, bundle, arithmetic=EXACT)(inputs)


CASES: list[tuple[tuple[nn.Module, ...], int, bool]] = [
    ((nn.GELU(), nn.SiLU()), 8, True),
    ((nn.GELU("tanh"), ByErf()), 4, False),
]


@pytest.mark.parametrize(("activations", "bits", "products"), CASES)
def test_files_give_the_bits_of_the_simulation_however_they_are_run(
    activations: tuple[nn.Module, ...], bits: int, products: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    report, inputs, wanted = exported(tmp_path, Transformer(*activations).eval(), bits, products)
    assert report.parity.arithmetic == str(EXACT) and not report.notes
    assert [row for row in report.parity.parts if row.largest] == []
    assert report.parity.whole.largest == 0.0 and report.parity.whole.size > 0.0
    for level in LEVELS:
        found = torch.from_numpy(optimized(report.path, inputs, level))
        assert torch.equal(found, wanted), level
    (found,) = ReferenceEvaluator(str(report.path)).run(None, {"input": inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-6)
    graph = onnx.load(report.path).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert not {"Gelu", "Erf", "LayerNormalization"} & kinds.keys() and kinds["Sqrt"] >= 7


X = 3 * torch.randn(64, 17, 48, generator=torch.Generator().manual_seed(0))
WEIGHT, BIAS = torch.linspace(0.5, 2, 48), torch.linspace(-1, 1, 48)
OPERATORS: dict[str, tuple[dict[str, Any], tuple[Tensor, ...], Callable[[Tensor], Tensor]]] = {
    "LayerNormalization": (
        {"axis": -1, "epsilon": 1e-6},
        (WEIGHT, BIAS),
        lambda x: F.layer_norm(x, (48,), WEIGHT, BIAS, 1e-6),
    ),
    "Softmax": ({"axis": 1}, (), lambda x: x.softmax(1)),
    "Sigmoid": ({}, (), torch.sigmoid),
    "Tanh": ({}, (), torch.tanh),
    "Exp": ({}, (), torch.exp),
    "Gelu": ({}, (), F.gelu),
    "Erf": ({}, (), torch.erf),
    "MatMul": ({}, (torch.outer(WEIGHT, BIAS),), lambda x: torch.matmul(x, torch.outer(WEIGHT, BIAS))),
}


@pytest.mark.parametrize("op", OPERATORS)
@torch.no_grad()
def test_single_operators_are_functions_in_doubles(op: str, tmp_path: Path) -> None:
    attributes, parameters, func = OPERATORS[op]
    names = [f"p{n}" for n in range(len(parameters))]
    stored = [onnx.numpy_helper.from_array(p.numpy(), n) for n, p in zip(names, parameters, strict=True)]
    ends = [onnx.helper.make_tensor_value_info(name, 1, ["n", 17, 48]) for name in ("input", "y")]
    node = onnx.helper.make_node(op, ["input", *names], ["y"], **attributes)
    graph = onnx.helper.make_graph([node], "one", ends[:1], ends[1:], stored)
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))
    assert widen(model.graph, ()) == 1 and widen(model.graph, list(model.graph)) == 0
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, tmp_path / "m.onnx")
    with Doubles():
        wanted = func(X)
    for level in LEVELS:
        assert torch.equal(torch.from_numpy(optimized(tmp_path / "m.onnx", X, level)), wanted), level

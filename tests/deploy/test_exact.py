"""Files in exact sums: the simulation's bits, in ONNX Runtime however it optimizes, and in another reader."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import dqss
from dqss.apply import apply_strategy
from dqss.arithmetic import EXACT, FAKE_QUANTIZED
from dqss.arithmetic.codes import CodeSum, code_sum
from dqss.deploy.report import ExportReport
from dqss.deploy.targets import GENERIC, ONNXRUNTIME_CPU
from dqss.errors import TargetError
from dqss.mixing import Grid
from search_spaces import uniform
from tests.deploy.support import bundle_for
from tests.support.nets import cnn, images

LEVELS = ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_LAYOUT", "ENABLE_ALL")
BITS = tuple(range(2, 9))
Build = Callable[[], tuple[nn.Module, Tensor]]


class Same(nn.Conv2d):
    """Pads in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 2, 0)))


class Branches(nn.Module):
    """Residuals of every kind: of layers with a bias and without, of a layer and a quantized input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Same(3, 8, 3)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.deep, self.grouped = (
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 8, 3, padding=1, groups=2),
        )
        self.last, self.head = (
            nn.Conv2d(8, 8, 3, stride=2, padding_mode="reflect", padding=1),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = F.relu(self.left(x) + self.right(x))
        x = F.leaky_relu(x + self.deep(x), 0.1)
        x = F.max_pool2d(self.grouped(x) + x, 2, 1)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers on more axes, of one output, without a bias; a convolution and a pool of one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pool = nn.Conv1d(3, 8, 3, padding="same"), nn.AdaptiveAvgPool1d(1)
        self.first, self.bare, self.one = nn.Linear(8, 7), nn.Linear(7, 7, bias=False), nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.embed(x.flatten(2)))
        tokens = self.bare(F.relu(self.first(x.transpose(1, 2))))
        return self.one(tokens).flatten(1) + self.pool(x).flatten(1)[:, :1]


class Wide(nn.Module):
    """Sums that leave 2^24, so that digits are summed apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 600, 1), nn.Conv2d(600, 3, 3)
        self.third, self.last = nn.Linear(3 * 16, 5000), nn.Linear(5000, 4)
        for layer in (self.second, self.last):
            # All of them large, as no other layer's are.
            with torch.no_grad():
                layer.weight.uniform_(0.8, 1.0).mul_(torch.randn_like(layer.weight).sign())

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu(self.first(x)))
        return self.last(F.relu(self.third(x.flatten(1))))


def dead() -> nn.Module:
    model = Branches()
    with torch.no_grad():
        model.deep.weight[:2] *= torch.tensor([1e-12, 1e-39]).reshape(2, 1, 1, 1)
        model.grouped.weight[3] = 0
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "branches": Branches,
    "tokens": Tokens,
    "digits": Wide,
    "dead channels": dead,
    "batch norm": cnn,
}
SPACES: dict[str, dict[str, Any]] = {
    "usual": {"bits": (8, 8)},
    "narrow": {"bits": (4, 4)},
    "mixed": {"bits": (BITS, BITS)},
    "affine": {"bits": (BITS, BITS), "weight_symmetric": False},
    "by tensor": {"bits": (BITS, BITS), "weight_granularity": "tensor", "activation_symmetric": True},
}


def exported(
    name: str, space: str, path: Path, exact: bool | None = None
) -> tuple[ExportReport, Tensor, Tensor]:
    """What was written, inputs, and what the simulation makes of them."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]().eval(), 2 * images(9)
    options = dict(SPACES[space])
    bits = options.pop("bits")
    bundle = bundle_for(model, inputs, uniform(*bits, ["mse"], ["minmax", "mse"], **options), start=1)
    report = dqss.export_model(model, bundle, path / "model.onnx", inputs, exact=exact)
    with torch.no_grad():
        return report, inputs, apply_strategy(model, bundle, arithmetic=EXACT)(inputs)


def optimized(path: Path, inputs: Tensor, level: str, **entries: str) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"input": inputs.numpy()})[0]
    assert isinstance(found, np.ndarray)
    return found


FEW = {("branches", "mixed"), ("tokens", "affine"), ("digits", "usual"), ("dead channels", "narrow")}
FEW |= {("batch norm", "by tensor")}
CASES = [
    pytest.param(name, space, marks=() if (name, space) in FEW else pytest.mark.slow)
    for name in NETWORKS
    for space in SPACES
]


@pytest.mark.parametrize(("name", "space"), CASES)
def test_files_give_the_bits_of_the_simulation_however_they_are_run(
    name: str, space: str, tmp_path: Path
) -> None:
    report, inputs, wanted = exported(name, space, tmp_path)
    assert report.parity.arithmetic == str(EXACT) and not report.notes
    assert {row.largest for row in report.parity.parts} == {0.0} and len(report.parity.parts) > 2
    assert report.parity.whole.largest == 0.0 and report.parity.whole.size > 0.0
    for level in LEVELS:
        for disabled in "01":
            found = optimized(report.path, inputs, level, disable_quant_qdq=disabled)
            assert torch.equal(torch.from_numpy(found), wanted), level
    assert torch.equal(torch.from_numpy(optimized(report.path, inputs[:1], "ENABLE_ALL")), wanted[:1])
    (found,) = ReferenceEvaluator(str(report.path)).run(None, {"input": inputs.numpy()})
    assert torch.equal(torch.from_numpy(found), wanted)


def test_the_simulation_is_near_the_other_one_and_another(tmp_path: Path) -> None:
    report, _, _ = exported("branches", "usual", tmp_path)
    assert report.parity.distance is not None
    assert 0 < report.parity.distance.relative_error < report.parity.whole.noise


def test_digits_are_used_and_take_no_more_room(tmp_path: Path) -> None:
    report, _, _ = exported("digits", "usual", tmp_path)
    graph = onnx.load(report.path).graph
    kinds = {entry.name: entry.data_type for entry in graph.initializer}
    assert kinds["last.weight.whole"] == onnx.TensorProto.INT4
    assert kinds["last.weight.whole1"] == onnx.TensorProto.UINT4
    assert kinds["first.weight.whole"] == onnx.TensorProto.INT8
    canonical, _, _ = exported("digits", "usual", tmp_path, exact=False)
    assert report.sizes.file < 1.05 * canonical.sizes.file
    assert report.sizes.floating == canonical.sizes.floating
    assert report.sizes.estimate == canonical.sizes.estimate


def test_the_pattern_that_converters_look_for_is_there_for_the_asking(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = cnn(), images(8)
    bundle = bundle_for(model, inputs, uniform(8, 8, ["mse"], ["mse"]))
    forms = {}
    for exact in (None, True, False):
        report = dqss.export_model(model, bundle, tmp_path / "m.onnx", inputs, exact=exact)
        nodes = onnx.load(report.path).graph.node
        forms[exact] = [node.op_type for node in nodes]
        assert report.parity.arithmetic == str(FAKE_QUANTIZED if exact is False else EXACT)
    assert forms[None] == forms[True] != forms[False]
    assert forms[False].count("DequantizeLinear") == 2 * forms[False].count("QuantizeLinear") == 6
    assert "Mul" not in forms[False] and forms[True].count("Mul") == 3
    facts = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert facts["dqss.arithmetic"] == "fake quantization"


class Adds(nn.Module):
    """Points in the network's own forward, where its averages are too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        # Of windows both torch and ONNX Runtime add up row by row.
        x = F.avg_pool2d(F.relu(self.stem(x)), 3, 1, 1)
        return self.head((self.body(x) + x).mean((2, 3)))


def test_strategies_with_points_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Adds().eval(), images(8)
    bundle = bundle_for(model, inputs, ONNXRUNTIME_CPU.adapt(uniform(8, 8, ["mse"], ["mse"])))
    assert bundle.strategy.points
    report = dqss.export_model(model, bundle, tmp_path / "m.onnx", inputs)
    assert report.parity.arithmetic == str(EXACT) and report.parity.whole.largest == 0.0
    network = apply_strategy(model, bundle, arithmetic=EXACT)
    wanted = network(inputs)
    assert torch.equal(copy.deepcopy(network)(inputs), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(network))(inputs), wanted)


def test_what_the_simulation_does_not_follow_is_written_in_the_other_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(weight: Tensor, grid: Grid, inputs: Grid) -> CodeSum | None:
        total = code_sum(weight, grid, inputs)
        if total is not None and weight.shape == model[3].weight.shape:
            total.digits.parts[0].neg_()
        return total

    torch.manual_seed(0)
    model, inputs = cnn(), images(8)
    bundle = bundle_for(model, inputs, uniform(8, 8, ["mse"], ["mse"]))
    monkeypatch.setattr("dqss.deploy.exact.code_sum", damaged)
    report = dqss.export_model(model, bundle, tmp_path / "m.onnx", inputs)
    assert report.parity.arithmetic == str(FAKE_QUANTIZED)
    (note,) = report.notes
    assert "written as the pattern that converters look for" in note and "computed by 3" in note


def test_targets_with_integer_kernels_have_one_form() -> None:
    with pytest.raises(TargetError, match="exact=true is for target=generic") as caught:
        ONNXRUNTIME_CPU.in_form(True)
    assert len(str(caught.value).splitlines()) == 1
    assert ONNXRUNTIME_CPU.in_form(False) == ONNXRUNTIME_CPU.in_form(None) == ONNXRUNTIME_CPU
    assert GENERIC.in_form(None) == GENERIC.in_form(True) == GENERIC != GENERIC.in_form(False)
    assert GENERIC.in_form(False).in_form(False) == GENERIC.in_form(False)


def test_images_of_open_size_are_averaged_as_before(tmp_path: Path) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.body(x))
            return x * self.gate(F.adaptive_avg_pool2d(x, 1))

    torch.manual_seed(0)
    model, inputs = Gate().eval(), images(8)
    bundle = bundle_for(model, inputs, uniform(8, 8, ["mse"], ["mse"]))
    report = dqss.export_model(model, bundle, tmp_path / "open.onnx", inputs)
    assert report.open_axes == {"input": (0, 2, 3)} and report.parity.whole.relative_error < 1e-2
    fixed = dqss.export_model(model, bundle, tmp_path / "fixed.onnx", inputs, dynamic_size=False)
    assert fixed.parity.whole.largest == 0.0


class Again(nn.Module):
    """One layer called three times, whose weight is read beside it too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.relu(self.layer(x))
        return x + self.layer.weight[0]


def test_weights_that_are_read_otherwise_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Again().eval(), torch.randn(8, 6)
    # At five bits the other form has them at the upper end of a byte.
    bundle = bundle_for(model, inputs, uniform(5, 8, ["mse"], ["mse"]))
    report = dqss.export_model(model, bundle, tmp_path / "m.onnx", inputs)
    assert report.parity.arithmetic == str(EXACT) and report.parity.whole.largest == 0.0
    names = {entry.name for entry in onnx.load(report.path).graph.initializer}
    assert {"layer.weight.whole", "layer.weight.codes"} <= names

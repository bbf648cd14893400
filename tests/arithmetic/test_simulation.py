"""The integer simulation as a module, and as what files are compared with."""

import copy
import pickle
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dqss
from dqss.apply import apply_strategy
from dqss.arithmetic import FAKE_QUANTIZED, ONNXRUNTIME
from dqss.arithmetic.kernels import LayerKernel
from dqss.arithmetic.numbers import Bytes
from dqss.bundle import Bundle
from dqss.deploy.report import ExportReport
from dqss.deploy.targets import ONNXRUNTIME_CPU
from experiments.export.networks import NETWORKS as NETWORKS_OF_THE_STUDY
from experiments.export.networks import Files
from experiments.export.run import drawn, strategy
from search_spaces import uniform
from tests.points.test_points import WIDTH, Concatenates, InPlace, Network, Residual, Writes, batch, conv
from tests.support.nets import bundle_of, prepared_supernet


def bundle_at(bits: int, model: nn.Module, inputs: Tensor) -> Bundle:
    space = ONNXRUNTIME_CPU.adapt(uniform(bits, 8, ["mse"], ["minmax", "mse"]))
    prepared, supernet = prepared_supernet(model, inputs, space)
    return bundle_of(prepared, supernet, supernet.argmax(), inputs)


def exported(model: nn.Module, inputs: Tensor, path: Path, bits: int = 8) -> ExportReport:
    bundle = bundle_at(bits, model, inputs)
    return dqss.export_model(model, bundle, path / "model.onnx", inputs, target=ONNXRUNTIME_CPU)


def check_equal(report: ExportReport) -> None:
    assert report.parity.arithmetic == str(ONNXRUNTIME) and not report.notes
    assert not report.kernels.floating, report.kernels
    assert len(report.parity.parts) > 2
    assert {row.largest for row in report.parity.parts} == {0.0}
    assert report.parity.whole.largest == 0.0 and report.parity.whole.size > 0.0


class Same(nn.Conv2d):
    """Pads in its forward, by how large its input is, as networks from TensorFlow do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, x.shape[2] % 2 + 1)))


class Pools(nn.Module):
    """A largest value of nine, an average squeezed, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.same = conv(), Same(WIDTH, WIDTH, 3, stride=2, groups=WIDTH)
        self.first, self.last = nn.Linear(WIDTH, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.same(F.max_pool2d(F.relu6(self.stem(x)), 3, 2)))
        return self.last(F.relu(self.first(x.mean((2, 3)))))


NETWORKS = {
    "residual, concatenation, pool, linear": lambda: Network(Residual(), Concatenates(), Residual()),
    "in place": lambda: Network(InPlace(), Writes()),
    "pools": Pools,
}


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NETWORKS)
def test_files_equal_it_to_the_bit(name: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = exported(NETWORKS[name]().eval(), 3 * batch(12), tmp_path, bits)
    check_equal(report)
    # And it is not the other simulation under another name.
    assert report.parity.distance is not None
    assert 0 < report.parity.distance.relative_error < 0.2 * report.parity.whole.noise + 0.05


def test_the_report_says_what_was_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Network(Residual()).eval(), batch(8)
    bundle = bundle_at(8, model, inputs)
    report = dqss.export_model(model, bundle, tmp_path / "model.onnx", inputs, target=ONNXRUNTIME_CPU)
    assert any("integer arithmetic; its own difference" in line for line in report.lines())
    fake = dqss.export_model(model, bundle, tmp_path / "generic.onnx", inputs, exact=False)
    assert report.sizes.floating == fake.sizes.floating and report.sizes.estimate == fake.sizes.estimate
    summary = report.summary()["parity"]
    assert summary["arithmetic"] == "integer arithmetic" and summary["fake_quantized"]["relative_error"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["W8A8", "W4A8"])
def test_a_real_network(bits: str, shared_data: Path, tmp_path: Path) -> None:
    case = NETWORKS_OF_THE_STUDY["resnet20"](Files(shared_data, None, None))
    bundle = strategy(case, bits, ONNXRUNTIME_CPU)
    few = drawn(case.samples, 200)
    report = dqss.export_model(case.model, bundle, tmp_path / "m.onnx", few, target=ONNXRUNTIME_CPU)
    check_equal(report)
    assert report.parity.whole.agreement == 1.0


def test_other_targets_and_strategies_without_points_are_compared_as_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Network(Residual()).eval(), batch(8)
    generic = dqss.export_model(
        model, bundle_at(8, model, inputs), tmp_path / "generic.onnx", inputs, exact=False
    )
    assert generic.parity.arithmetic == str(FAKE_QUANTIZED) and generic.parity.distance is None
    prepared, supernet = prepared_supernet(model, inputs, uniform(8, 8, ["mse"], ["mse"]))
    plain = bundle_of(prepared, supernet, supernet.argmax(), inputs)
    report = dqss.export_model(model, plain, tmp_path / "plain.onnx", inputs, target=ONNXRUNTIME_CPU)
    assert report.parity.arithmetic == str(FAKE_QUANTIZED)


def test_what_it_does_not_follow_is_compared_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A runtime with other kernels than those that are known.
    requantize = Bytes.requantize
    monkeypatch.setattr(Bytes, "requantize", lambda *args: requantize(*args) + 3 * args[0].scale)
    torch.manual_seed(0)
    report = exported(Network(Residual()).eval(), batch(8), tmp_path)
    assert report.parity.arithmetic == str(FAKE_QUANTIZED) and report.parity.distance is None
    (note,) = report.notes
    assert (
        "a simulation in integer arithmetic does not follow the file" in note and "computed by stem" in note
    )
    assert max(row.largest for row in report.parity.parts if row.part.call is not None) <= 1


def test_large_biases_and_dead_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Network(Residual(), Residual()).eval()
    with torch.no_grad():
        for layer in (model.stem, model.blocks[0].first):
            assert isinstance(layer, nn.Conv2d) and layer.bias is not None
            layer.weight[0] *= 1e-11
            layer.weight[1] = 0
            layer.bias[0], layer.bias[1], layer.bias[2] = 0.7, -0.3, 40.0
    inputs = batch(12)
    report = exported(model, inputs, tmp_path)
    check_equal(report)
    stored = {
        entry.name: onnx.numpy_helper.to_array(entry) for entry in onnx.load(report.path).graph.initializer
    }
    largest = max(abs(stored[name].astype(int)).max() for name in stored if name.endswith("bias.codes"))
    assert 2**28 < largest <= 2**30


def kernels(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LayerKernel)]


def test_it_is_a_plain_module() -> None:
    torch.manual_seed(0)
    model, inputs = Network(Residual(), Residual()).eval(), batch(8)
    bundle = bundle_at(8, model, inputs)
    integers = apply_strategy(model, bundle, arithmetic=ONNXRUNTIME)
    assert len(kernels(integers)) == 6
    wanted = integers(inputs)
    assert torch.equal(copy.deepcopy(integers)(inputs), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(integers))(inputs), wanted)
    assert isinstance(integers.stem, nn.Conv2d) and type(integers.stem).__name__ == "Conv2d"
    plain = apply_strategy(model, bundle)
    assert set(integers.state_dict()) == set(plain.state_dict()) and not kernels(plain)
    assert torch.equal(plain(inputs), apply_strategy(model, bundle, arithmetic=FAKE_QUANTIZED)(inputs))


def test_it_does_not_depend_on_how_it_is_computed() -> None:
    torch.manual_seed(0)
    model, inputs = Network(Residual(), Residual()).eval(), batch(8)
    integers = apply_strategy(model, bundle_at(8, model, inputs), arithmetic=ONNXRUNTIME)
    wanted = integers(inputs)
    assert torch.equal(torch.cat([integers(x[None]) for x in inputs]), wanted)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(integers(inputs), wanted)
    # Scales stay what they are when the network is moved, and so does what is computed with them.
    assert torch.equal(integers.double()(inputs.double()).float(), wanted)


def test_exported_it_is_what_it_stands_for() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(conv(), nn.ReLU(), conv()).eval(), batch(4)
    bundle = bundle_at(8, model, inputs)
    called = []
    for arithmetic in (ONNXRUNTIME, FAKE_QUANTIZED):
        network = apply_strategy(model, bundle, arithmetic=arithmetic)
        program = torch.export.export(network, (inputs,), strict=False)
        called.append([str(node.target) for node in program.graph.nodes if node.op == "call_function"])
    assert called[0] == called[1] and "aten.conv2d.default" in called[0]


class Tokens(nn.Module):
    """A linear layer on more axes than two, which is no kernel with an integer bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = conv(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.embed(x)).flatten(2).transpose(1, 2))


def test_linear_layers_on_tokens_keep_their_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Tokens().eval(), batch(8)
    bundle = bundle_at(8, model, inputs)
    integers = apply_strategy(model, bundle, arithmetic=ONNXRUNTIME)
    assert kernels(integers) == ["embed.integer_kernel"]
    assert torch.equal(integers.head.bias, model.head.bias)
    report = dqss.export_model(model, bundle, tmp_path / "m.onnx", inputs, target=ONNXRUNTIME_CPU)
    assert report.parity.whole.relative_error < 1e-6

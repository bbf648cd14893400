"""Whole networks: a file gives the simulation's answers, or is not written."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import dqss
from dqss.apply import apply_strategy
from dqss.bundle import load
from dqss.deploy import lower as lowering
from dqss.deploy.compared import Parity
from dqss.deploy.grids import Stored
from dqss.deploy.targets import ONNXRUNTIME_CPU
from dqss.deploy.tolerance import Tolerance
from dqss.errors import DataError, ExportError, OutputError, ParityError
from dqss.space import Rule, SearchSpace
from search_spaces import uniform
from tests.deploy.support import bundle_for
from tests.support.nets import cnn, images, output, small_space
from tests.support.zoo import NETWORKS

MIXED = small_space(range(2, 9), ["mse"])


def session(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


# Of the others, one branches on values and two take inputs that no batch can be made of.
TRACED = [name for name in NETWORKS if name != "used twice" and "structured" not in name]


@pytest.mark.parametrize("name", TRACED)
def test_networks_of_every_shape(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, batch = NETWORKS[name]
    model, inputs = build().eval(), batch()
    bundle = bundle_for(model, inputs, small_space(range(2, 9), ["mse"], products=True), start=3)
    report = dqss.export_model(model, bundle, tmp_path / "model.onnx", [inputs])
    # The part that is left is fed with integers and computes in float: nothing but its roundings.
    assert report.parity.parts[-1].part.call is None and report.parity.parts[-1].largest < 1e-5
    assert {row.part.call for row in report.parity.parts[:-1]} != set() or name == "weight read"
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)


def test_groups_axes_and_wide_grids(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, inputs = cnn(), images(8)
    for number, options in enumerate(
        (
            {"weight_granularity": "group", "weight_group_size": 5, "weight_symmetric": False},
            {"activation_granularity": "channel", "weight_granularity": "tensor"},
            {"bits": (9, 12, 16)},
        )
    ):
        space = small_space(options.pop("bits", (3, 6, 8)), ["mse"], **options)
        report = dqss.export_model(
            model, bundle_for(model, inputs, space), tmp_path / f"{number}.onnx", inputs
        )
        assert report.parity.whole.relative_error < 1e-4


def test_another_reader_agrees(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model, inputs = cnn(), images(6)
    bundle = bundle_for(model, inputs, MIXED)
    dqss.export_model(model, bundle, tmp_path / "model.onnx", inputs)
    found = ReferenceEvaluator(str(tmp_path / "model.onnx")).run(None, {"input": inputs.numpy()})[0]
    wanted = output(apply_strategy(model, bundle), inputs).numpy()
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_batches_of_any_size_and_what_the_file_says_of_itself(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, inputs = cnn(), images(5)
    bundle = bundle_for(model, inputs, small_space(8))
    bundle.strategy.model.input["config"] = {"checkpoint": "/home/someone/secret.pth"}
    report = dqss.export_model(model, bundle, tmp_path / "deep" / "model.onnx", inputs)
    assert report.open_axes == {"input": (0,)}
    simulation = apply_strategy(model, bundle)
    for count in (1, 2, 9):
        x = images(count)
        (found,) = session(report.path).run(None, {"input": x.numpy()})
        assert found.shape == (count, 4) and np.allclose(found, output(simulation, x).numpy(), atol=0.01)
    file = onnx.load(report.path)
    facts = {entry.key: entry.value for entry in file.metadata_props}
    layers = json.loads(facts["dqss.strategy"])["layers"]
    assert list(layers) == list(bundle.strategy.layers) == ["0", "3", "6"]
    modules = {
        node.op_type: entry.value
        for node in file.graph.node
        for entry in node.metadata_props
        if node.op_type in ("Conv", "Gemm") and entry.key == "dqss.module"
    }
    assert modules == {"Conv": "3", "Gemm": "6"}
    data = report.path.read_bytes()
    assert b"secret" not in data and str(Path(__file__).parents[2]).encode() not in data
    assert b"torch.onnx" not in data
    assert report.sizes.file == len(data)


@pytest.mark.parametrize("weight_bits", [4, 8])
def test_all_of_it_runs_in_integers(weight_bits: int, tmp_path: Path) -> None:
    torch.manual_seed(4)
    model, inputs = cnn(), images(16)
    bundle = bundle_for(model, inputs, uniform(weight_bits, 8, ["mse"], ["mse"]))
    report = dqss.export_model(model, bundle, tmp_path / "model.onnx", inputs, target=ONNXRUNTIME_CPU)
    assert report.kernels.floating.total() == 0
    assert report.kernels.integer == {"QLinearConv": 2, "QGemm": 1}
    assert next(iter(report.lines())) == f"weights: 3 of {weight_bits} bits as int8"


@pytest.mark.parametrize(
    "space",
    [
        SearchSpace("test", (Rule(weight=uniform(8, 8, ["mse"], ["mse"]).rules[0].weight),)),
        uniform(4, 8, ["mse"], ["mse"], weight_granularity="group", weight_group_size=16),
    ],
    ids=["weights alone", "groups"],
)
def test_no_runtime_quantizes_by_itself(space: SearchSpace, tmp_path: Path) -> None:
    # With an eight-bit weight, or one in blocks, and no say in it, it rounds the inputs of products.
    torch.manual_seed(8)
    model, inputs = (
        nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5)).eval(),
        torch.randn(4, 6, 64),
    )
    report = dqss.export_model(model, bundle_for(model, inputs, space), tmp_path / "model.onnx", inputs)
    assert report.parity.whole.relative_error < 1e-5
    assert "MatMulNBits" not in report.kernels.floating


@pytest.mark.parametrize("bits", [5, 8])
def test_dead_channels_do_not_overflow_a_bias(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(7)
    model, inputs = cnn(), images(16)
    layer = model[3]
    assert isinstance(layer, nn.Conv2d) and layer.bias is not None
    with torch.no_grad():
        layer.weight[1:3] *= torch.tensor([1e-12, 1e-8]).reshape(2, 1, 1, 1)
        layer.bias[1:3] = torch.tensor([0.8, -0.5])
    bundle = bundle_for(model, inputs, uniform(bits, 8, ["mse"], ["mse"]))
    scale = bundle.tensors["3.weight.scale"] * bundle.tensors["3.activation.scale"]
    assert float((layer.bias.detach() / scale).abs().max()) > 2**31
    report = dqss.export_model(model, bundle, tmp_path / "model.onnx", inputs, target=ONNXRUNTIME_CPU)
    assert report.kernels.integer == {"QLinearConv": 2, "QGemm": 1}


def test_layers_that_one_weight_serves_store_it_once(tmp_path: Path) -> None:
    build, batch = NETWORKS["tied"]
    model, inputs = build().eval(), batch()
    bundle = bundle_for(model, inputs, small_space(8))
    report = dqss.export_model(model, bundle, tmp_path / "model.onnx", [inputs])
    names = [entry.name for entry in onnx.load(report.path).graph.initializer if ".whole" in entry.name]
    assert len(names) == 2  # first and second, and the head


# -- failures ---------------------------------------------------------------------------------


def damage(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From now on one weight of the layer is written down wrong."""
    store = lowering.store

    def damaged(weight, *args, **kwargs):  # type: ignore[no-untyped-def]
        stored: Stored = store(weight, *args, **kwargs)
        if weight.shape == layer.weight.shape:
            stored.codes.reshape(-1)[0] ^= 0x40
        return stored

    layer = cnn().get_submodule(name)
    monkeypatch.setattr(lowering, "store", damaged)


@pytest.mark.parametrize(
    ("name", "place"), [("0", "3.activation, computed by 0"), ("6", "the output, computed by 6")]
)
def test_a_wrong_weight_is_found_by_name_and_nothing_is_written(
    name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    model, inputs = cnn(), images(8)
    bundle = bundle_for(model, inputs, small_space(8))
    file = tmp_path / "model.onnx"
    file.write_bytes(b"old")
    damage(monkeypatch, name)
    seen: list[Parity] = []
    with pytest.raises(ParityError, match=f"differs from the simulation at {place}") as caught:
        dqss.export_model(model, bundle, file, inputs, watch=seen.append, exact=False)
    assert len(str(caught.value).splitlines()) == 1
    assert len(seen) == 1 and seen[0].failing(Tolerance())
    assert file.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_a_tolerance_that_nothing_meets(tmp_path: Path) -> None:
    torch.manual_seed(6)
    model, inputs = cnn(), images(8)
    bundle = bundle_for(model, inputs, small_space(8))
    with pytest.raises(ParityError, match=r"at the end .* although every layer alone agrees"):
        dqss.export_model(model, bundle, tmp_path / "x.onnx", inputs, tolerance=Tolerance(agreement=1.1))
    assert not list(tmp_path.iterdir())


def test_networks_that_cannot_be_traced(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            return y if y.sum() > 0 else -y

    model, inputs = Branches().eval(), torch.randn(4, 6)
    bundle = bundle_for(model, inputs, small_space(8))
    with pytest.raises(ExportError, match="torch cannot trace this network for ONNX") as caught:
        dqss.export_model(model, bundle, tmp_path / "x.onnx", inputs)
    assert len(str(caught.value).splitlines()) == 1 and not list(tmp_path.iterdir())


def test_other_precisions_are_refused(tmp_path: Path) -> None:
    model, inputs = cnn(), images(4)
    bundle = bundle_for(model, inputs, small_space(8))
    bundle.strategy.model.input["signature"] = {"shape": [4, 3, 6, 6], "dtype": "bfloat16"}
    half = cnn().to(torch.bfloat16)
    with pytest.raises(ExportError, match="bfloat16: give it in float32"):
        dqss.export_model(half, bundle, tmp_path / "x.onnx", inputs.bfloat16(), force=True)


def test_no_inputs_are_refused(tmp_path: Path) -> None:
    model = cnn()
    with pytest.raises(DataError, match="inputs are empty"):
        dqss.export_model(model, bundle_for(model, images(2), small_space(8)), tmp_path / "x.onnx", [])


def test_a_forward_that_fixes_the_batch_takes_single_inputs(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x.reshape(int(x.shape[0]), 6))

    model, inputs = Fixed().eval(), torch.randn(5, 6)
    report = dqss.export_model(model, bundle_for(model, inputs, small_space(8)), tmp_path / "x.onnx", inputs)
    assert report.open_axes == {"input": ()} and report.parity.whole.count == 5


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    model, inputs = cnn(), images(4)
    bundle = bundle_for(model, inputs, small_space(8))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        dqss.export_model(model, bundle, tmp_path / "file" / "x.onnx", inputs)


def test_names_in_a_strategy_lead_nowhere(tmp_path: Path) -> None:
    # A layer's name may look like a path: it is text in the file, and nothing is opened.
    model = nn.Sequential()
    model.add_module("/etc/passwd", nn.Linear(6, 3))
    inputs = torch.randn(4, 6)
    bundle = bundle_for(model.eval(), inputs, small_space(8)).save(tmp_path / "run")
    assert bundle.strategy == load(tmp_path / "run").strategy
    dqss.export_model(model, load(tmp_path / "run"), tmp_path / "out" / "model.onnx", inputs)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "run"]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["model.onnx"]
    file = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert all(entry.data_location == onnx.TensorProto.DEFAULT for entry in file.graph.initializer)

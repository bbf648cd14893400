"""Networks as people have them, at every width of the question: part by part as the simulation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
from torch import Tensor, nn

import dqss
from dqss.apply import apply_strategy
from dqss.deploy.report import ExportReport
from dqss.deploy.targets import ONNXRUNTIME_CPU
from dqss.models.resnet_cifar import CifarResNet
from dqss.models.rlfn import RLFN
from dqss.space import SearchSpace
from search_spaces import uniform
from tests.deploy.support import bundle_for

MIXED = list(range(2, 9))
SPACES = {
    "W8A8": uniform(8, 8, ["mse"], ["mse"], products=True),
    "W4A8": uniform(4, 8, ["mse"], ["mse"], products=True),
    "W4A4": uniform(4, 4, ["mse"], ["mse"], products=True),
    "mixed": uniform(MIXED, MIXED, ["mse"], ["mse"], products=True),
}


def resnet20() -> tuple[nn.Module, Tensor]:
    return CifarResNet(20), torch.randn(12, 3, 16, 16)


def vit_tiny() -> tuple[nn.Module, Tensor]:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    return model, torch.randn(12, 3, 32, 32)


def mobilenetv2() -> tuple[nn.Module, Tensor]:
    return timm.create_model("mobilenetv2_050", num_classes=10), torch.randn(8, 3, 64, 64)


def rlfn() -> tuple[nn.Module, Tensor]:
    return RLFN(2, channels=8, blocks=2), 255 * torch.rand(4, 3, 24, 20)


def exported(
    build: Callable[[], tuple[nn.Module, Tensor]], space: SearchSpace, path: Path, exact: bool | None = None
) -> ExportReport:
    torch.manual_seed(0)
    model, inputs = build()
    bundle = bundle_for(model.eval(), inputs, space)
    return dqss.export_model(model, bundle, path, inputs, exact=exact)


def check(report: ExportReport) -> None:
    """What the export itself has checked, and that it checked something."""
    parts = report.parity.parts
    assert len(parts) > 10 and all(row.count > 0 for row in parts)
    integer = [row for row in parts if row.part.call is not None]
    assert max(row.largest for row in integer) <= 1
    assert max(row.share for row in integer if row.count > 1000) <= 0.003
    assert report.parity.whole.relative_error <= max(2 * report.parity.whole.noise, 1e-4)


@pytest.mark.parametrize("build", [vit_tiny, rlfn])
def test_parts_agree(build: Callable[[], tuple[nn.Module, Tensor]], tmp_path: Path) -> None:
    check(exported(build, SPACES["mixed"], tmp_path / "model.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("bits", SPACES)
@pytest.mark.parametrize("build", [resnet20, vit_tiny, mobilenetv2, rlfn])
def test_parts_agree_at_every_width(
    build: Callable[[], tuple[nn.Module, Tensor]], bits: str, tmp_path: Path
) -> None:
    check(exported(build, SPACES[bits], tmp_path / "model.onnx"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv2_050", "regnetx_002", "convnext_atto", "edgenext_xx_small"])
def test_with_points_everything_runs_in_integers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = timm.create_model(name, num_classes=10).eval(), torch.randn(4, 3, 64, 64)
    bundle = bundle_for(
        model, inputs, ONNXRUNTIME_CPU.adapt(uniform(8, 8, ["minmax"], ["minmax"], products=True))
    )
    report = dqss.export_model(model, bundle, tmp_path / "model.onnx", inputs, target=ONNXRUNTIME_CPU)
    check(report)
    assert not report.kernels.floating and not report.notes


def test_images_of_any_size(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, inputs = rlfn()
    bundle = bundle_for(model.eval(), inputs, uniform(8, 8, ["mse"], ["mse"]))
    report = dqss.export_model(model, bundle, tmp_path / "model.onnx", inputs)
    assert report.open_axes == {"input": (0, 2, 3)}
    session = ort.InferenceSession(report.path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    simulation = apply_strategy(model, bundle)
    for shape in ((1, 3, 24, 20), (2, 3, 31, 45), (3, 3, 50, 27)):
        x = 255 * torch.rand(shape)
        (found,) = session.run(None, {"input": x.numpy()})
        with torch.no_grad():
            wanted = simulation(x).numpy()
        assert found.shape == wanted.shape
        assert np.linalg.norm(found - wanted) <= 0.01 * np.linalg.norm(wanted)


def test_products_of_attention_are_quantized_too(tmp_path: Path) -> None:
    report = exported(vit_tiny, SPACES["W8A8"], tmp_path / "model.onnx", exact=False)
    calls = {row.part.call[0] for row in report.parity.parts if row.part.call is not None}
    assert {f"blocks.1.attn.product0.{name}" for name in ("query", "key", "probabilities", "value")} <= calls
    assert report.kernels.integer["QLinearMatMul"] + report.kernels.integer["MatMulIntegerToFloat"] >= 12

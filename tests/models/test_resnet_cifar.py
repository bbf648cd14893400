"""The CIFAR ResNet against published counts and published weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dqss.errors import ModelError
from dqss.models.factory import cifar_resnet
from dqss.models.resnet_cifar import CifarResNet, _Shortcut
from tests.support.cifar_npz import load_jpeg_npz

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_parameter_counts_are_those_of_the_paper(depth: int, millions: float) -> None:
    count = sum(parameter.numel() for parameter in CifarResNet(depth).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.006)


def test_shortcut_is_subsampling_with_zero_channels() -> None:
    x = torch.randn(2, 16, 8, 8)
    out = _Shortcut(32, stride=2)(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() == 0 == out[:, 24:].abs().sum()


def test_depths_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ModelError, match="6 n \\+ 2"):
        CifarResNet(21)


@torch.no_grad()
def accuracy(depth: int, weights: Path, images: Tensor, labels: Tensor) -> float:
    model = cifar_resnet(f"resnet{depth}", checkpoint=weights).module
    inputs = (images / 255 - MEAN) / STD
    return float(model(inputs).argmax(dim=1).eq(labels).float().mean())


@pytest.mark.parametrize(("name", "expected"), [("resnet20-12fca82f", 0.900), ("resnet56-4bfd9763", 0.910)])
def test_published_weights_reach_their_known_accuracy(shared_data: Path, name: str, expected: float) -> None:
    depth = int(name[6:8])
    with np.load(shared_data / "cifar10" / "lossless_test_200.npz") as archive:
        images = torch.from_numpy(archive["images"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(archive["labels"].astype(np.int64))
    found = accuracy(depth, shared_data / "cifar10" / f"{name}.th", images, labels)
    assert found == pytest.approx(expected, abs=1e-6)


def test_published_weights_on_recompressed_images(shared_data: Path) -> None:
    images, labels = load_jpeg_npz(shared_data / "cifar10" / "test_jpeg.npz", count=1000)
    found = accuracy(20, shared_data / "cifar10" / "resnet20-12fca82f.th", images, labels)
    assert found == pytest.approx(0.81, abs=0.025)


def test_first_stage_is_the_residual_formula() -> None:
    block = CifarResNet(20).eval().layer1[0]
    x = torch.randn(2, 16, 8, 8)
    inner = F.relu(F.conv2d(x, block.conv1.weight, padding=1) / (1 + block.bn1.eps) ** 0.5)
    outer = F.conv2d(inner, block.conv2.weight, padding=1) / (1 + block.bn2.eps) ** 0.5
    torch.testing.assert_close(block(x), F.relu(outer + x))

"""The networks of the study, each with inputs to calibrate on and real ones to compare on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from dqss.data.imagefolder import ImageFolder
from dqss.models.factory import cifar_resnet, timm_model
from dqss.models.super_resolution import super_resolution
from dqss.samples import Samples
from experiments.cifar_resnet20.run import read
from experiments.families.run import Entry, make_model, read_entries

FAMILIES = Path(__file__).parent.parent / "families" / "models.txt"


@dataclass
class Case:
    """A network under study.

    Attributes:
        model: in float.
        calibration: a batch.
        samples: what is compared, with targets where they are known.
        images: ``real`` or ``noise``.
    """

    model: nn.Module
    calibration: Tensor
    samples: Samples
    images: str


@dataclass(frozen=True)
class Files:
    """Where data and weights are."""

    data: Path
    mobilenet: Path | None
    efficientnet: Path | None


def _resnet20(files: Files) -> Case:
    folder = files.data / "cifar10"
    model = cifar_resnet(checkpoint=folder / "resnet20-12fca82f.th").module
    images, labels = read(folder / "test_jpeg.npz")
    return Case(model, read(folder / "train_jpeg.npz", np.arange(64))[0], _labelled(images, labels), "real")


def _imagenet(name: str, checkpoint: Path | None, files: Files) -> Case:
    loaded = timm_model(name, checkpoint=checkpoint, checkpoint_mapping="order")
    data = ImageFolder(files.data / "imagenet" / "calibration", files.data / "imagenet" / "dev")
    data.configure(loaded.input, loaded.num_classes)
    loader = data.val_dataloader()
    assert loader is not None
    images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
    calibration: Tensor = data.calibration().batch(range(0, 256, 8))
    return Case(loaded.module, calibration, _labelled(images, labels), "real")


def _rlfn(files: Files) -> Case:
    model = super_resolution("rlfn", 4, files.data / "sr" / "weights" / "rlfn_x4.pth").module
    pictures = [_picture(path) for path in sorted((files.data / "sr" / "Set5" / "x4" / "LR").glob("*.png"))]
    patches = torch.stack([picture[0, :, :48, :48] for picture in pictures])
    return Case(model, patches, Samples.of(pictures), "real")


def _noise(build: Callable[[], nn.Module], size: int) -> Case:
    torch.manual_seed(0)
    model = build().eval()
    images = torch.randn(72, 3, size, size, generator=torch.Generator().manual_seed(1))
    return Case(model, images[:8], Samples.of(images[8:]), "noise")


def _labelled(images: Tensor, labels: Tensor) -> Samples:
    return Samples.of([(images, labels)], labelled=True)


def _picture(path: Path) -> Tensor:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float()[None]


NETWORKS: dict[str, Callable[[Files], Case]] = {
    "resnet20": _resnet20,
    "mobilenetv2": lambda files: _imagenet("mobilenetv2_100", files.mobilenet, files),
    "efficientnet_lite0": lambda files: _imagenet("tf_efficientnet_lite0", files.efficientnet, files),
    "resnet18": lambda files: _noise(torchvision.models.resnet18, 96),
    "vit_tiny": lambda files: _noise(lambda: timm.create_model("vit_tiny_patch16_224", img_size=64), 64),
    "rlfn_x4": _rlfn,
}


def family(entry: Entry) -> Case:
    """A network of the study of families, with noise for inputs."""
    model = make_model(entry)
    images = torch.randn(24, 3, entry.size, entry.size, generator=torch.Generator().manual_seed(1))
    return Case(model, images[:8], Samples.of(images[8:]), "noise")


def families() -> Iterator[Entry]:
    """Those of timm, in the order of their list."""
    return (entry for entry in read_entries(FAMILIES) if entry.source == "timm")

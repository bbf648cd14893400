"""CIFAR-10 from files in torchvision's layout."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from dqss.data.cifar10 import Cifar10
from dqss.errors import DataError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two small files in CIFAR-10's format, with their own checksums."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    lists, random = {}, np.random.default_rng(0)
    for name, count in (("train_list", 40), ("test_list", 20)):
        data = random.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        content = pickle.dumps({"data": data, "labels": [index % 10 for index in range(count)]})
        (folder / name).write_bytes(content)
        lists[name] = [[name, hashlib.md5(content).hexdigest()]]
        monkeypatch.setattr(CIFAR10, name, lists[name])
    meta = pickle.dumps({"label_names": [str(index) for index in range(10)]})
    (folder / "meta").write_bytes(meta)
    sums = {"filename": "meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()}
    monkeypatch.setattr(CIFAR10, "meta", sums)
    return tmp_path


def test_images_and_labels_come_out_normalized(root: Path) -> None:
    data = Cifar10(root, calibration_images=20, batch_size=8)
    samples = data.calibration()
    assert samples.batch(range(20)).shape == (20, 3, 32, 32)
    targets = samples.targets(range(20))
    assert targets is not None and targets.bincount().tolist() == [2] * 10
    loader = data.val_dataloader()
    assert loader is not None
    inputs = torch.cat([inputs for inputs, _ in loader])
    raw = torch.from_numpy(CIFAR10(str(root), train=False).data).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(inputs, (raw - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert torch.cat([targets for _, targets in loader]).tolist() == [index % 10 for index in range(20)]


def test_missing_and_edited_files_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root=FOLDER or data\.download=true"):
        Cifar10(tmp_path / "elsewhere").calibration()
    path = root / CIFAR10.base_folder / "train_list"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="corrupted"):
        Cifar10(root).calibration()

"""The embedded photographs."""

from pathlib import Path

import pytest

from dqss.data.paired_images import read_pixels
from dqss.data.photographs import _TRAINING, _VALIDATION, Photographs
from dqss.errors import DataError
from dqss.models.super_resolution import super_resolution


@pytest.fixture
def data() -> Photographs:
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    data = Photographs(calibration_images=9)
    data.configure(super_resolution("rlfn", 2).input)
    return data


def test_training_and_validation_share_no_picture(data: Photographs) -> None:
    assert not set(_TRAINING) & set(_VALIDATION)
    pixels = [read_pixels(pair.high) for pair in (*data.training_pairs(), *(data.validation_pairs() or ()))]
    assert len({image.numpy().tobytes() for image in pixels}) == len(_TRAINING) + len(_VALIDATION) == 12


def test_patches_and_whole_pictures(data: Photographs) -> None:
    batch = data.calibration().batch(range(9))
    assert batch.shape == (9, 3, 64, 64) and 200 < batch.max() <= 255
    # Photographs: much nearer to their neighbours than two patches are to one another.
    assert (batch.diff(dim=-1).abs().mean() * 2) < (batch - batch.flip(0)).abs().mean()
    loader = data.val_dataloader()
    assert loader is not None
    shapes = [(tuple(images.shape[2:]), tuple(targets.shape[2:])) for images, targets in loader]
    assert shapes == [
        ((150, 225), (300, 450)),
        ((200, 300), (400, 600)),
        ((213, 320), (426, 640)),
    ]
    assert "9 patches of 64x64 out of 9 pictures, enlarged x2; 3 pictures to measure on" in data.summary()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> object:
        raise ModuleNotFoundError(package)

    monkeypatch.setattr("dqss.data.photographs.files", missing)
    with pytest.raises(DataError, match="needs scikit-image: pip install scikit-image"):
        Photographs().training_pairs()


def test_a_missing_picture_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dqss.data.photographs.files", lambda package: tmp_path)
    with pytest.raises(
        DataError, match=r"the installed scikit-image has no astronaut\.png: pip install --upgrade"
    ):
        Photographs().training_pairs()
